"""Opens an exported HF folder with another program: PYTHON elsewhere_readers.py transformers|mlx FOLDER REQUEST ANSWER

Runs in an environment of that program; `scripts/open_elsewhere.py` makes it and compares. REQUEST is a JSON file of
"prompts" (lists of ids), "new_tokens", "conversations" and "save" (a folder, or null). ANSWER becomes an .npz file of
`logits_I` (float32 [T, V]) and `greedy_I` of each prompt, and `chat_I` of each conversation.
"""

import json
import sys
from typing import Any

import numpy as np


def with_transformers(folder: str, request: dict[str, Any]) -> dict[str, np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answer = {}
    for index, prompt in enumerate(request["prompts"]):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            answer[f"logits_{index}"] = model(ids).logits[0].float().numpy()
            new = model.generate(ids, max_new_tokens=request["new_tokens"], do_sample=False, eos_token_id=-1)
        answer[f"greedy_{index}"] = new[0, len(prompt) :].numpy()
    for index, messages in enumerate(request["conversations"]):
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer[f"chat_{index}"] = np.array(made)
    if request["save"]:
        model.save_pretrained(request["save"])
    return answer


def with_mlx(folder: str, request: dict[str, Any]) -> dict[str, np.ndarray]:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(folder)
    answer = {}
    for index, prompt in enumerate(request["prompts"]):
        cache = make_prompt_cache(model)
        logits = model(mx.array([prompt]), cache=cache)[0]
        answer[f"logits_{index}"] = np.array(logits.astype(mx.float32))
        new: list[int] = []
        while len(new) < request["new_tokens"]:
            new.append(int(mx.argmax(logits[-1])))
            logits = model(mx.array([new[-1:]]), cache=cache)[0]
        answer[f"greedy_{index}"] = np.array(new)
    for index, messages in enumerate(request["conversations"]):
        # Left out, mlx-lm turns it on for every vocabulary that has <think>.
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
        answer[f"chat_{index}"] = np.array(made)
    return answer


def main(program: str, folder: str, request: str, answer: str) -> None:
    with open(request) as file:
        wanted = json.load(file)
    read = {"transformers": with_transformers, "mlx": with_mlx}[program]
    np.savez(answer, **read(folder, wanted))


if __name__ == "__main__":
    main(*sys.argv[1:])
