"""A process of its own that asks transformers' AutoProcessor, with torchvision beside torch's CPU build.

    python -m tests.weights.auto_processor EXTRAS FOLDER … -- PICTURE …

torchvision's wheel from PyPI holds operators for CUDA, so that they do not load here; its transforms, which processors
use, are plain Python. They import once the operators' names are known. Prints one line of JSON: class names, and where
`FOLDER/asked.safetensors` lies: what the processor makes of the pictures and a question.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

QUESTION = "What colour is the star?"


def import_torchvision(folder: Path) -> None:
    """Make `import torchvision` work from `folder`, without its compiled operators."""
    import torch

    kernels = (folder / "torchvision" / "_meta_registrations.py").read_text()
    names = set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', kernels))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}(Tensor x) -> Tensor")
    import_torchvision.library = library  # type: ignore[attr-defined]  # the names live as long as it does
    sys.path.insert(0, str(folder))
    load, torch.ops.load_library = torch.ops.load_library, refuse
    import torchvision  # noqa: F401

    torch.ops.load_library = load


def refuse(path: str) -> None:
    """Some environments have what the compiled operators need, and then torch ends the process over their names."""
    raise OSError(f"{path} is a CUDA build")


def main(extras: str, folders: list[str], pictures: list[str]) -> None:
    import_torchvision(Path(extras))
    import transformers
    from PIL import Image
    from safetensors.torch import save_file

    images = [Image.open(picture) for picture in pictures]
    content: list[dict[str, Any]] = [*({"type": "image", "image": image} for image in images)]
    content.append({"type": "text", "text": QUESTION})
    said = {}
    for folder in folders:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        asked = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        save_file(
            {k: v.contiguous() for k, v in asked.items() if hasattr(v, "contiguous")}, f"{folder}/asked.safetensors"
        )
        said[folder] = {
            "processor": type(processor).__name__,
            "image_processor": type(processor.image_processor).__name__,
            "video_processor": type(getattr(processor, "video_processor", None)).__name__,
        }
    print(json.dumps(said))


if __name__ == "__main__":
    cut = sys.argv.index("--")
    main(sys.argv[1], sys.argv[2:cut], sys.argv[cut + 1 :])
