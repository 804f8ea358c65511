"""Opens an export of ours in programs that we did not write: python -m scripts.open_elsewhere [--official DIR]

Exports a trained run twice, as it is and with `--no-mtp`, opens each export with pinned versions of transformers (which
needs the official class, two .py files of a release, in DIR) and of mlx-lm, and compares with our own numbers: logits,
greedy ids, the ids of conversations under the exported chat template, and the tensors of what transformers saves again.
Nothing in an export is edited. Makes an environment for each program, once (Python 3.11; a GB or two of downloads).
"""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

import convert
from ling_jax.cli import run_main
from ling_jax.config.text import columns
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.tokenizer import tokenizer_of
from ling_jax.convert.verify import verify
from ling_jax.generate.engine import generate
from ling_jax.model.model import Ling

log = logging.getLogger("elsewhere")

ROOT = Path(__file__).parents[1]
READERS = ROOT / "scripts" / "elsewhere_readers.py"
OFFICIAL = ("configuration_bailing_moe_v2.py", "modeling_bailing_moe_v2.py")
PYTHON_MINOR = 11  # elsewhere pip takes torch builds with CUDA
TOLERANCE = 1e-4  # of a logit, times the largest of its row or 1
NEW_TOKENS = 48
PROMPTS = ("class ", "def main(argv):\n    ", "The quick brown fox", "\n\n    return [x for x in", "import os\nimport")
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is a token?"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "你好, naïve 123?"}],
    [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 3?"},
    ],
]


class Reader(NamedTuple):
    """A program at a version, and which export it opens."""

    name: str
    program: str  # of elsewhere_readers.py
    mtp: bool
    requirements: tuple[str, ...]


# The official class generates with an MTP layer up to transformers 4.52 only; mlx-lm knows no MTP tensors.
TORCH = ("torch==2.13.0", "jinja2", "accelerate")  # torch as in requirements-peers.txt
READERS_OF_OURS = (
    Reader("transformers-4.52.4", "transformers", True, ("transformers==4.52.4", *TORCH)),
    Reader("transformers-4.56.2", "transformers", False, ("transformers==4.56.2", *TORCH)),
    Reader("mlx-lm-0.32.2", "mlx", False, ("mlx-lm==0.32.2", "mlx[cpu]", "jinja2")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    checkpoint: str = "runs/quickstart"
    """A run of this project."""
    official: str | None = None
    """A folder with the release's configuration_bailing_moe_v2.py and modeling_bailing_moe_v2.py; without it only
    mlx-lm opens the export."""
    environments: str = ".venv-elsewhere"
    """Where an environment is made for each program."""


def environment(folder: Path, reader: Reader) -> Path:
    """The Python of a reader's environment, which is made where there is none."""
    requirements = folder / f"{reader.name}.txt"
    requirements.write_text("\n".join(reader.requirements) + "\n")
    if not (folder / reader.name / f"installed-{reader.name}").exists():
        words = [ROOT / "scripts" / "make_venv.sh", folder / reader.name, requirements, PYTHON_MINOR]
        subprocess.run(list(map(str, words)), check=True, stdout=sys.stderr, env=os.environ | {"PIP_QUIET": "1"})
    return folder / reader.name / "bin" / "python"


def export(command: Command, target: Path, mtp: bool) -> Path:
    """A float32 export of the checkpoint, with the official class beside it if there is one."""
    words = ["to-hf", "--source", command.checkpoint, "--target", str(target), "--format", "fp32"]
    convert.main([*words, *([] if mtp else ["--no-mtp"])])
    for name in OFFICIAL if command.official else ():
        shutil.copy(Path(command.official or "") / name, target / name)
    return target


def compare(model: Ling, request: dict[str, Any], answer: dict[str, np.ndarray], chats: list[list[int]]) -> list[str]:
    """Lists where an answer differs from the model's own numbers; prints the largest difference of the logits."""
    wrong, largest = [], 0.0
    greedy = generate(model, request["prompts"], request["new_tokens"])
    for index, prompt in enumerate(request["prompts"]):
        ours = np.asarray(model(jax.numpy.asarray([prompt])).logits_BTV[0])
        distance = np.abs(answer[f"logits_{index}"] - ours).max() / max(1.0, np.abs(ours).max())
        largest = max(largest, float(distance))
        if distance > TOLERANCE:
            wrong.append(f"logits of prompt {index} by {distance:.1e}")
        if answer[f"greedy_{index}"].tolist() != list(greedy[index]):
            wrong.append(f"greedy ids of prompt {index}")
    wrong += [f"chat {i}" for i, ids in enumerate(chats) if answer[f"chat_{i}"].tolist() != ids]
    log.info("largest difference of a logit: %.1e", largest)
    return wrong


def open_with(reader: Reader, folder: Path, python: Path, work: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The reader's answer; ValueError with its last words if it fails."""
    asked, answer = work / f"{reader.name}.json", work / f"{reader.name}.npz"
    asked.write_text(json.dumps(request))
    words = [python, READERS, reader.program, folder, asked, answer]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{reader.name} cannot open {folder}:\n{done.stderr[-2000:]}")
    return dict(np.load(answer))


def main(argv: Sequence[str]) -> int:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.open_elsewhere", description=__doc__)
    if command.official and (missing := [n for n in OFFICIAL if not (Path(command.official) / n).is_file()]):
        raise ValueError(f"--official {command.official} lacks {', '.join(missing)}: bring them from a release")
    readers = [reader for reader in READERS_OF_OURS if command.official or reader.program != "transformers"]
    if not command.official:
        log.warning("without --official DIR only mlx-lm opens the export")
    model, tokenizer = load_pretrained(command.checkpoint, dtype="float32"), tokenizer_of(command.checkpoint)
    prompts = [tokenizer.prefix_ids + tokenizer.encode(text) for text in PROMPTS]
    chats = [tokenizer.encode_chat(messages) for messages in CONVERSATIONS]
    rows = [("program", "export", "result")]
    environments = Path(command.environments).absolute()
    environments.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        exports = {mtp: export(command, work / name, mtp) for mtp, name in ((True, "whole"), (False, "no-mtp"))}
        for reader in readers:
            python = environment(environments, reader)
            saved = work / f"{reader.name}-saved" if reader.program == "transformers" else None
            request = {"prompts": prompts, "new_tokens": NEW_TOKENS, "conversations": CONVERSATIONS}
            request["save"] = None if saved is None else str(saved)
            source = exports[reader.mtp]
            answer = open_with(reader, source, python, work, request)
            wrong = compare(model, request, answer, chats)
            if saved and not (again := verify(str(source), str(saved), logits=False)).good:
                wrong.append(f"what it saves again: {again.render()}")
            rows.append((reader.name, source.name, "; ".join(wrong) or "equal"))
    print(columns(rows))
    return int(any(result != "equal" for *_, result in rows[1:]))


if __name__ == "__main__":
    run_main(main)
