"""Continues a prompt: python sample.py --checkpoint DIR --prompt TEXT [--chat] [...]; --help lists every flag."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from ling_jax.cli import named_config, program, run_main
from ling_jax.config import ONE_DEVICE, MeshConfig
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.tokenizer import ends_of, generation_config_of, tokenizer_of
from ling_jax.convert.weights import model_config_of
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.generate.engine import Engine
from ling_jax.generate.requests import Request, check_drafts, check_request
from ling_jax.generate.sampling import Sampling
from ling_jax.generate.text import Asker, Stats, converse, read_prompts
from ling_jax.plan.serving import make_serving_plan, render

DEFAULTS = {"temperature": 0.7, "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleCommand:
    checkpoint: str | None = None
    """A run folder, its checkpoints/, one step of it, a HF folder, or a hub id (ORG/NAME or ORG/NAME@REVISION)."""
    prompt: str | None = None
    """The text to continue, or with --chat the user's message."""
    prompt_file: str | None = None
    """A JSONL file of objects with "prompt", or "messages" and "tools"; each comes out with its "completion"."""
    chat: bool = False
    """Use the chat template; without a prompt, talk until Ctrl-D (Ctrl-C ends an answer)."""
    system: str | None = None
    """The system message of a chat."""
    thinking: Literal["on", "off"] | None = None
    """Whether a chat asks for reasoning before the answer; by default the chat template decides."""
    max_new_tokens: int = 64
    """Most tokens to add."""
    samples: int = 1
    """Answers to each prompt."""
    temperature: float | None = None
    """0 is greedy; by default what generation_config.json says (do_sample false: 0), else 0.7."""
    top_p: float | None = None
    """Smallest probability mass to draw from; by default as above, else 0.8."""
    top_k: int | None = None
    """Most tokens to draw from, 0 or -1 for all; by default as above, else 0."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the best."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens seen so far (HF's rule); by default as above, else 1."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens of the answer so far."""
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    """Pairs of a token id and what is added to its logit."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are cut off."""
    seed: int = 0
    """Same seed, same text."""
    drafts: int = 0
    """Tokens that the MTP layer predicts at each step (speculative decoding)."""
    batch_size: int = 8
    """Prompts of a file that are run side by side."""
    context_length: int = 4096
    """Most tokens of a conversation."""
    stats: bool = False
    """Print speeds to standard error."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and computation; by default weights are as stored, and computation float32 on CPU, else bfloat16."""
    fp8: bool = False
    """Keep the matrices of attention and FFNs as FP8 blocks: half of bfloat16's bytes."""
    mesh: MeshConfig = ONE_DEVICE
    """Devices to decode on: rows over data, fsdp and expert, experts over expert, heads over tensor."""
    topology: str | None = None
    """Compile prefill and a decoding step of --batch-size rows of --context-length tokens for a TPU topology such as
    v5e:2x4, print what they need and what bounds them, and stop."""
    config: str | None = None
    """With --topology: a model of configs/ instead of a checkpoint."""
    json: bool = False
    """With --topology: only one JSON object."""


def sampling_of(command: SampleCommand, saved: dict[str, Any]) -> Sampling:
    """Flags, else what generation_config.json says, else the defaults; greedy where it says `do_sample: false` and no
    flag asks for a draw."""
    chosen = {name: getattr(command, name) for name in DEFAULTS}
    asked = any(chosen[name] is not None for name in ("temperature", "top_p", "top_k")) or command.min_p > 0
    if saved.get("do_sample") is False and not asked:
        chosen["temperature"] = 0.0
    known = DEFAULTS | {name: value for name, value in saved.items() if value is not None}
    settings = {name: known[name] if value is None else value for name, value in chosen.items()}
    settings["top_k"] = 0 if settings["top_k"] == -1 else int(settings["top_k"])  # -1 is all, as in other programs
    others = {name: getattr(command, name) for name in ("min_p", "presence_penalty", "logit_bias")}
    return Sampling(**settings, **others)


def encode(tokenizer: Tokenizer, command: SampleCommand, record: dict[str, Any]) -> list[int]:
    """Token ids of a prompt or a conversation."""
    messages = record.get("messages")
    if not command.chat and messages is None:
        if command.system is not None or command.thinking is not None:
            raise ValueError("--system and --thinking are for conversations: add --chat, or leave them out")
        return tokenizer.prefix_ids + tokenizer.encode(record["prompt"])
    if messages is None:
        messages = [{"role": "user", "content": record["prompt"]}]
    if command.system is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": command.system}, *messages]
    return tokenizer.encode_chat(messages, record.get("tools"), thinking=thinking_of(command))


def thinking_of(command: SampleCommand) -> bool | None:
    return None if command.thinking is None else command.thinking == "on"


def show(text: str) -> None:
    print(text, end="", flush=True)


def plan(command: SampleCommand) -> int:
    """Prints what serving the model on a topology takes; 3 if it does not fit."""
    if (command.config is None) == (command.checkpoint is None):
        raise ValueError("with --topology give one of --config NAME and --checkpoint DIR")
    model = model_config_of(command.checkpoint) if command.checkpoint else named_config(command.config or "").model
    made = make_serving_plan(
        model,
        command.mesh,
        command.topology or "",
        rows=command.batch_size,
        slots=command.context_length,
        dtype=command.dtype or "bfloat16",
        fp8=command.fp8,
    )
    print(made.to_json() if command.json else f"{render(made)}\n\n{made.to_json()}")
    return 0 if made.fits else 3


def check(command: SampleCommand) -> None:
    """Raises ValueError for flags that do not go together, or have no meaning."""
    for name in ("samples", "batch_size", "context_length"):
        if (value := getattr(command, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} = {value} must be at least 1")
    if command.topology is not None:
        return
    if command.checkpoint is None or command.config is not None or command.json:
        raise ValueError("give --checkpoint DIR; --config and --json go with --topology")
    given = [command.prompt is not None, command.prompt_file is not None]
    if sum(given) > 1 or not (any(given) or command.chat):
        raise ValueError("give one of --prompt, --prompt-file and, for a conversation, --chat alone")


@dataclasses.dataclass(frozen=True)
class Asked:
    """All that is known before the weights are read."""

    tokenizer: Tokenizer
    request: Request
    records: list[dict[str, Any]]
    prompts: list[list[int]]  # of the records
    slots: int
    stops: int


def ask(command: SampleCommand, checkpoint: str) -> Asked:
    """Reads, encodes and checks all that is asked; for a conversation, how it would begin.

    Raises:
      ValueError: for what cannot be run; of a file of prompts, every line that cannot.
    """
    config, tokenizer = model_config_of(checkpoint), tokenizer_of(checkpoint)
    check_drafts(config, command.drafts)
    ends, sampling = ends_of(checkpoint, tokenizer), sampling_of(command, generation_config_of(checkpoint))
    new, talking = command.max_new_tokens, command.prompt is None and command.prompt_file is None
    request = Request(prompt=(), max_new_tokens=new, sampling=sampling, seed=command.seed, stop_ids=ends)
    room = min(command.context_length, config.max_positions) if talking else config.max_positions
    prompts: list[list[int]] = []

    def prepare(record: dict[str, Any]) -> None:
        ids = encode(tokenizer, command, record)
        check_request(config, dataclasses.replace(request, prompt=ids), room, len(ends))
        prompts.append(ids)

    if command.prompt_file is not None:
        records = read_prompts(command.prompt_file, prepare)
    else:
        records = [{"prompt": "Hi" if command.prompt is None else command.prompt}]
        prepare(records[0])
    slots = room if talking else 1 << (max(map(len, prompts)) + new - 1).bit_length()
    return Asked(tokenizer, request, records, prompts, slots, max(len(ends), 1))


def main(argv: Sequence[str]) -> int:
    command = tyro.cli(SampleCommand, args=list(argv), prog=program("sample.py"), description=__doc__)
    check(command)
    if command.topology is not None:
        return plan(command)
    asked = ask(command, command.checkpoint or "")
    tokenizer, prompts = asked.tokenizer, asked.prompts
    rows = min(command.batch_size, len(prompts) * command.samples) if command.prompt_file else 1
    mesh = None if command.mesh.shape == ONE_DEVICE.shape else command.mesh
    model = load_pretrained(command.checkpoint or "", dtype=command.dtype, mesh=mesh)
    engine = Engine(model, rows=rows, slots=asked.slots, stops=asked.stops, drafts=command.drafts, fp8=command.fp8)
    asker = Asker(engine, tokenizer, asked.request, command.stop)

    def after(stats: Stats) -> None:
        if command.stats:
            print(stats, file=sys.stderr)

    if command.prompt_file:
        write_answers(asker, asked.records, prompts, command.samples)
    elif command.prompt is not None:
        stats = Stats()
        for sample in range(command.samples):
            show("" if command.chat else command.prompt)
            for piece in asker.stream(prompts[0], stats, sample):
                show(piece)
            print()
        after(stats)
    else:
        thinking = thinking_of(command)
        converse(asker, command.system, lambda m: tokenizer.encode_chat(m, thinking=thinking), input, show, after)
    return 0


def write_answers(asker: Asker, records: list[dict[str, Any]], prompts: list[list[int]], samples: int) -> None:
    """A JSON line for each answer, in the order of the prompts."""
    waiting, following = {}, 0
    for i, sample, text, answer in asker.complete(prompts, samples):
        more = {"completion": text, "end": answer.end, "tokens": len(answer.ids), "sample": sample}
        waiting[i * samples + sample] = records[i] | more
        while following in waiting:
            print(json.dumps(waiting.pop(following), ensure_ascii=False), flush=True)
            following += 1


def run() -> None:
    """The command `ling-sample`."""
    run_main(main)
