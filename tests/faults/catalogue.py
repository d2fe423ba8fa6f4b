"""Every fault that is injected: what it is, the test that injects it, and the guard without which that test fails.

Groups: A crash during a save, B damaged checkpoint, C resources, D signals and ranks, E numbers, F data determinism,
G indexed files, H preprocessing, I hostile input. `tests/repo/test_fault_catalogue.py` fails where a fault of a group
has no test that pytest collects. A test id without brackets stands for all its cases.
"""

from __future__ import annotations

from typing import NamedTuple

SIZES = {"A": 8, "B": 8, "C": 5, "D": 8, "E": 6, "F": 6, "G": 8, "H": 5, "I": 4}


class Fault(NamedTuple):
    """One fault: group letter and number, words, pytest node id, and file and function of the guard."""

    id: str
    words: str
    test: str
    guard: str


COMPLETE = "ABCDEFGHI"
"""Groups whose every fault has a row; a letter is added here together with the group's last row."""

_SAVE = "tests/faults/test_checkpoint_faults.py"
_KILLED = "tests/faults/test_killed_saves.py::test_a_trainer_killed_while_saving_loses_nothing"
_DAMAGE = f"{_SAVE}::test_damage_is_refused_by_name"
_FAILED = f"{_KILLED.partition('::')[0]}::test_a_save_that_cannot_be_written_is_one_line_and_leaves_the_last_checkpoint"
_FULL_BUILD = "tests/unit/test_cli.py::test_where_nothing_more_fits_nothing_is_left_half_written"
_HOSTILE = "tests/faults/test_hostile_checkpoints.py"
_INDEXED = "tests/faults/test_indexed_files.py::test_damage_is_found_by_name"
_INPUT = "tests/parity/test_convert_bad_input.py::test_code_that_a_configuration"
_RANKS = "tests/faults/test_ranks.py"
_SIGNAL = f"{_RANKS}::test_a_signal_saves_and_ends_with_its_code_within_the_grace"
_NUMBERS = "tests/faults/test_numbers.py"
_ORDER = "tests/faults/test_data_determinism.py"
_RESUMED = f"{_ORDER}::test_a_resume_loses_no_window_and_reads_none_twice"
_BUILD = "tests/faults/test_data_faults.py"
_SAFE = "tests/unit/test_safetensors_io.py"
_POINTER = f"{_SAVE}::test_a_bad_pointer_says_what_exists"

FAULTS = [
    Fault("A1", "SIGKILL before any byte", f"{_KILLED}[before any byte]", "store.py begin: a directory of its own"),
    Fault("A2", "SIGKILL mid-shard", f"{_KILLED}[mid-shard]", "store.py begin: a hidden directory"),
    Fault("A3", "SIGKILL after the shards, before the metadata", f"{_KILLED}[before the metadata]", "store.py publish"),
    Fault("A4", "SIGKILL after the metadata, before the rename", f"{_KILLED}[before the rename]", "store.py publish"),
    Fault("A5", "SIGKILL between rename and pointer", f"{_KILLED}[before the pointer]", "store.py publish: the order"),
    Fault("A6", "SIGKILL while the pointer is written", f"{_KILLED}[in the pointer]", "files.py write_bytes"),
    Fault("A7", "SIGKILL while old checkpoints are pruned", f"{_KILLED}[while pruning]", "store.py retire"),
    Fault("A8", "SIGKILL in the background writer", f"{_KILLED}[in the background]", "store.py begin, publish"),
    Fault("B1", "flipped byte in weights or moments", f"{_DAMAGE}[flipped byte]", "seal.py _verify: hashes"),
    Fault("B2", "truncated shard", f"{_DAMAGE}[truncated shard]", "seal.py _verify: sizes"),
    Fault("B3", "missing shard", f"{_DAMAGE}[missing shard]", "seal.py _verify: missing names"),
    Fault("B4", "missing metadata", f"{_DAMAGE}[missing metadata]", "seal.py _verify: missing names"),
    Fault("B5", "empty or garbage pointer", _POINTER, "store.py latest_checkpoint"),
    Fault(
        "B6",
        "pointer to an absent step",
        f"{_POINTER}[step_00000099-names 'step_00000099']",
        "store.py latest_checkpoint",
    ),
    Fault("B7", "mixed shards of two steps", f"{_DAMAGE}[shard of another step]", "seal.py _verify"),
    Fault(
        "B8",
        "wrong model shape",
        "tests/distributed/test_resume.py::test_weights_of_another_shape_are_refused",
        "sharded.py load_state",
    ),
    Fault("C1", "disk full in a save", f"{_FAILED}[disk full]", "save.py Saver._write, together.py on_all_ranks"),
    Fault("C2", "disk full in preprocessing", _FULL_BUILD, "errors.py machine_problem; pairs.py: names given last"),
    Fault("C3", "read-only directory", f"{_FAILED}[read-only directory]", "save.py Saver._explain"),
    Fault("C4", "failing device, short writes", f"{_FAILED}[failing device]", "save.py Saver._explain"),
    Fault("C5", "too many open files", f"{_FAILED}[too many open files]", "save.py Saver._write: cleaning may fail"),
    Fault("D1", "SIGTERM in the forward pass", f"{_SIGNAL}[in forward]", "stop.py _receive: asks"),
    Fault("D2", "SIGTERM in a save", f"{_SIGNAL}[in a save]", "stop.py _receive: asks"),
    Fault(
        "D3",
        "SIGTERM before the first step",
        f"{_RANKS}::test_a_signal_before_the_first_step_ends_at_once",
        "stop.py _receive: leaves",
    ),
    Fault("D4", "SIGTERM twice", f"{_SIGNAL}[twice]", "stop.py _receive: asks"),
    Fault("D5", "SIGKILL of rank 1", f"{_RANKS}::test_a_killed_rank_is_named", "launch.py _explain"),
    Fault(
        "D6",
        "a rank hung by SIGSTOP",
        f"{_RANKS}::test_a_stopped_rank_is_named_within_the_timeout_with_the_last_collective",
        "watchdog.py _blame: silence",
    ),
    Fault(
        "D7",
        "two jobs on one save directory",
        f"{_RANKS}::test_a_second_job_on_a_run_directory_is_refused_and_harms_nothing",
        "start.py only_trainer",
    ),
    Fault(
        "D8",
        "a rank that raises alone",
        "tests/unit/test_watchdog.py::test_a_rank_that_ends_with_an_error_tells_the_others_why",
        "watchdog.py _say_farewell",
    ),
    Fault(
        "E1",
        "NaN loss once",
        f"{_NUMBERS}::test_a_nan_is_skipped_and_leaves_every_bit",
        "watch.py _judge: finite loss; statistics.py remember",
    ),
    Fault(
        "E2",
        "NaN gradient on one rank only",
        f"{_NUMBERS}::test_a_gradient_that_is_nan_on_one_rank_only_is_skipped_by_all",
        "watch.py _judge: finite norm",
    ),
    Fault("E3", "infinity", f"{_NUMBERS}::test_an_infinite_gradient_is_skipped", "watch.py _judge: finite norm"),
    Fault("E4", "10x spike", f"{_NUMBERS}::test_a_tenfold_spike_is_skipped_or_stops", "watch.py _judge: the bound"),
    Fault(
        "E5",
        "repeated NaN",
        f"{_NUMBERS}::test_numbers_that_stay_bad_stop_the_run_and_the_checkpoint_stays",
        "watch.py before_update: patience",
    ),
    Fault(
        "E6",
        "silent bit flip in a weight",
        f"{_NUMBERS}::test_a_flipped_bit_is_found_and_undone",
        "weights.py before_update",
    ),
    Fault("F1", "resume inside an epoch", f"{_RESUMED}[inside an epoch-2]", "data.py Batches.of_step"),
    Fault("F2", "resume between epochs", f"{_RESUMED}[between epochs-3]", "data.py Batches.of_step"),
    Fault("F3", "resume where the decay starts", f"{_RESUMED}[where the decay starts-8]", "data.py Batches.of_step"),
    Fault(
        "F4", "two ranks, then one", f"{_ORDER}::test_two_ranks_then_one_read_the_same_global_order", "data.py Batches"
    ),
    Fault("F5", "changed blend", f"{_ORDER}::test_a_changed_blend_is_refused", "change.py continued"),
    Fault(
        "F6",
        "cached index of another seed",
        f"{_ORDER}::test_a_cached_index_of_another_seed_is_not_used",
        "reader.py build_train_dataset",
    ),
    Fault("G1", "bin truncated", f"{_INDEXED}[bin truncated-alone]", "pairs.py read_index: sizes"),
    Fault("G2", "one token flipped", f"{_INDEXED}[one token flipped-alone]", "verify.py _check_histogram"),
    Fault("G3", "idx truncated", f"{_INDEXED}[idx truncated-alone]", "pairs.py read_index: sizes"),
    Fault("G4", "idx empty", f"{_INDEXED}[idx empty-alone]", "pairs.py read_index: the header"),
    Fault("G5", "idx of a bad magic", f"{_INDEXED}[idx bad magic-alone]", "pairs.py read_index: the mark"),
    Fault("G6", "pointer outside the bin", f"{_INDEXED}[idx bad pointer-alone]", "pairs.py _check_documents"),
    Fault("G7", "counts that do not match", f"{_INDEXED}[idx count mismatch-alone]", "pairs.py read_index: sizes"),
    Fault(
        "G8",
        "token outside the vocabulary",
        f"{_INDEXED}[token outside the vocabulary-alone]",
        "verify.py _count: rows",
    ),
    Fault(
        "H1",
        "mixed bad lines under skip and strict",
        f"{_BUILD}::test_mixed_bad_lines_stop_the_build_by_name_or_are_counted",
        "jsonl.py BadLines.add",
    ),
    Fault(
        "H2",
        "SIGKILL of a worker",
        f"{_BUILD}::test_a_killed_worker_ends_the_build_with_one_line_and_nothing_is_published",
        "executors.py _Worker.listen",
    ),
    Fault(
        "H3",
        "killed, then resumed",
        "tests/repo/test_kill_builds.py::test_a_few_kills_lose_nothing",
        "publish.py publish: names; stage.py Call.done",
    ),
    Fault("H4", "two writers", f"{_BUILD}::test_two_writers_on_one_directory", "build.py only_writer"),
    Fault(
        "H5",
        "input changed between resumes",
        f"{_BUILD}::test_an_input_changed_between_two_starts_is_seen",
        "tasks.py Piece.sha256",
    ),
    Fault(
        "I1", "pickles that call something", f"{_HOSTILE}::test_an_object_that_would_run_code_is_refused", "sharded.py"
    ),
    Fault(
        "I2", "paths and links that lead out", f"{_HOSTILE}::test_a_path_out_of_the_checkpoint_is_refused", "dist.py"
    ),
    Fault("I3", "auto_map of tokenizer or configuration", f"{_INPUT}_names_is_neither_run_nor_carried", "inert.py"),
    Fault(
        "I4", "safetensors header: huge or overlapping", f"{_SAFE}::test_a_damaged_file_is_refused_by_name", "opened.py"
    ),
]
