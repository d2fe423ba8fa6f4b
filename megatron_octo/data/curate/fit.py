"""Train one fastText model; run as a process of its own, see `train.fit`.

`python -m megatron_octo.data.curate.fit SETTINGS.json` takes the arguments of fastText's `train_supervised`, and `out`.
Exit code 9 means that fastText met a number that is none, 10 that it was left without words.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import sys
from pathlib import Path

NOT_A_NUMBER, NO_WORDS = 9, 10
_SET_SIGNAL_OF_PARENTS_DEATH = 1


def main() -> int:
    """Train as the file of settings says."""
    import fasttext

    with contextlib.suppress(AttributeError, OSError):  # Linux: end with the process that wants the model
        ctypes.CDLL(None).prctl(_SET_SIGNAL_OF_PARENTS_DEATH, signal.SIGKILL)
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = settings.pop("out")
    try:
        model = fasttext.train_supervised(**settings)
    except RuntimeError as error:
        if "NaN" not in str(error):
            raise
        return NOT_A_NUMBER
    if not set(model.get_words()) - {"</s>"}:
        return NO_WORDS
    model.save_model(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
