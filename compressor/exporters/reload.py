"""Run in a fresh process: load an exported folder with stock transformers and write down what it computes.

`python -m compressor.exporters.reload FOLDER REQUEST RESULT`: REQUEST holds `ids [N, T]` and `prompt [1, P]`;
RESULT gets float32 `logits [N, T, V]` and the greedy continuation. Nothing of this project is imported but this file.
"""

import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def main(folder: str, request: str, result: str) -> int:
    """Exit 0 and a result file, or 4 and the reason on stderr."""
    from transformers import AutoModelForCausalLM

    asked = load_file(request)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            print(f"{kind}: {', '.join(map(str, sorted(info[kind])[:5]))}", file=sys.stderr)
            return 4
    # Stacked experts stay in the dtype of the file's scales (transformers 5.23), and would compute in it
    torch.nn.Module.float(model.eval())  # transformers refuses `model.float()` on quantized models
    with torch.inference_mode():
        logits = torch.cat([model(row[None]).logits for row in asked["ids"]])
        new = int(asked["new_tokens"])
        length = {"max_new_tokens": new, "min_new_tokens": new}
        greedy = model.generate(asked["prompt"], do_sample=False, pad_token_id=0, **length)
    save_file({"logits": logits.float().contiguous(), "greedy": greedy.contiguous()}, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
