"""Does optimum-onnx load an exported folder, and what does it write? `with_optimum_onnx.py CONFIG`.

Runs in the environment of optimum-onnx.requirements.txt (transformers 4.57). The configuration names the folder, the
prompt's ids, the number of new tokens and the file for the result.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Load the folder and continue the prompt greedily."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = ORTModelForCausalLM.from_pretrained(config["folder"], local_files_only=True)
    prompt, new = torch.tensor([config["prompt"]]), config["new"]
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new, min_new_tokens=new,
        pad_token_id=0,
    )  # fmt: skip
    packages = {name: version(name) for name in ("optimum", "optimum-onnx", "transformers", "onnxruntime")}
    result = {"tokens": ids[0, prompt.shape[1] :].tolist(), "packages": packages}
    Path(config["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
