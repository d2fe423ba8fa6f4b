"""The reward: OpenRLHF's shape, the project's grader, and nothing that escapes."""

from __future__ import annotations

import importlib.util
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_octo.rl.reward import LOGS, Reward, response_of, reward_file

EOS, PAD = "<|end_of_text|>", "<|pad|>"
PROMPT = "Question: Put it in \\boxed{7}. What is 3+4?\nAnswer:"


def reward(**options) -> Reward:
    return Reward(eos=(EOS,), pad=PAD, **options)


def call(response: str, label: str = "7", prompt: str = PROMPT, **options) -> dict:
    return reward(**options)([prompt + response], [prompt], [label])


@pytest.mark.parametrize(
    ("response", "earned", "stopped", "boxed"),
    [
        (" 3+4=7. Answer \\boxed{7}" + EOS, 1, 1, 1),
        (" \\boxed{7}" + EOS + PAD * 3, 1, 1, 1),
        (" \\boxed{8} no, \\boxed{7}" + EOS, 1, 1, 1),
        (" \\boxed{7} no, \\boxed{8}" + EOS, 0, 1, 1),
        (" \\boxed{7}", 0, 0, 1),
        (" 7" + EOS, 0, 1, 0),
        ("", 0, 0, 0),
        (EOS, 0, 1, 0),
        (f" \\boxed{{7}}{EOS} and on", 0, 0, 1),
    ],
)
def test_verdicts(response: str, earned: float, stopped: float, boxed: float) -> None:
    result = call(response)
    assert result["rewards"] == result["scores"] == earned
    logs = result["extra_logs"]
    assert set(logs) == set(LOGS) and all(isinstance(value, float) for value in logs.values())
    assert (logs["stopped"], logs["format"], logs["correct"], logs["reward_errors"]) == (stopped, boxed, earned, 0)


def test_a_cut_response_may_count() -> None:
    assert call(" \\boxed{7}", require_stop=False)["rewards"] == 1


def test_the_prompts_own_box_is_never_graded() -> None:
    assert call(" I do not know." + EOS)["extra_logs"]["format"] == 0


def test_prompts_are_found_though_decoded_differently() -> None:
    assert response_of("Question: 1 +1?\nAnswer: 2", "Question: 1+1?\nAnswer:") == " 2"
    with pytest.raises(ValueError, match="does not begin"):
        response_of("something else entirely", PROMPT)


def test_nothing_escapes() -> None:
    def broken(*_, **__):
        raise RuntimeError("grader down")

    for result in (call(" \\boxed{7}" + EOS, grade=broken), reward()(["no such prompt"], [PROMPT], ["7"])):
        assert result["rewards"] == 0 and result["extra_logs"]["reward_errors"] == 1


HOSTILE = ["\\boxed{" * 2000, "\\boxed{" + "9^{" * 50 + "}" * 50, "\x00\ud800", "\\boxed{nan}", "\\boxed{\\frac{1}{0}}"]


@pytest.mark.parametrize("response", HOSTILE)
def test_hostile_responses_earn_nothing(response: str) -> None:
    result = call(response + EOS)
    numbers = [result["rewards"], result["scores"], *result["extra_logs"].values()]
    assert result["rewards"] == 0 and all(math.isfinite(number) for number in numbers)


def test_random_text_never_raises_from_threads() -> None:
    pieces = ["\\boxed{", "}", "{", EOS, PAD, "7", "-", "\\frac12", " ", "\n", "Answer:", PROMPT, "é", "\u202e"]
    generator = random.Random(0)
    texts = ["".join(generator.choices(pieces, k=generator.randrange(12))) for _ in range(200)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(call, texts))
    assert {result["rewards"] for result in results} <= {0.0, 1.0}
    assert all(result["extra_logs"]["reward_errors"] == 0 for result in results)


def test_several_responses_give_lists() -> None:
    result = reward()([PROMPT + " \\boxed{7}" + EOS, PROMPT + EOS], [PROMPT] * 2, ["7", "7"])
    assert result["rewards"] == [1, 0] and result["extra_logs"]["stopped"] == [1, 1]


def test_the_written_file_works_as_openrlhf_loads_it(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text(reward_file([EOS], PAD, require_stop=True), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("reward_func", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.reward_func([PROMPT + " \\boxed{7}" + EOS], [PROMPT], ["7"])
    assert result["rewards"] == 1.0
