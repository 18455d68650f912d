"""Images a CPU second: from JPEGs in shards to what the vision tower takes, patches of 336 x 336.

ours    index and pread -> simplejpeg (strict) -> PyTorch's antialiased bicubic on uint8 -> uint8; the device normalises
theirs  webdataset -> PIL decode -> PIL bicubic -> float32, normalised (torchvision's ToTensor and Normalize)

One core, everything else equal: the same shards in the same order, both squash the image to a square.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.made import SOURCE, conversations, prepared, tars
from benchmarks.paired import compare, timed
from benchmarks.report import parser, save, show
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.image import decode_image
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.storage.shards import ShardFolder

SIDE = 336
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPEC = image_spec(LayoutConfig(aspect="squash"), size=SIDE, patch=14, mean=MEAN)
SIZES = ((384, 384), (512, 512), (1024, 768))
CLAIMED = (512, 512)


def ours(source: Path) -> Callable[[], int]:
    folder = ShardFolder(str(source))

    def run() -> int:
        return sum(
            len(decode_image(data, SPEC, torch_resize)[1].grids)
            for i in range(len(folder))
            for data in folder.images(i)
        )

    return run


def theirs(source: Path) -> Callable[[], int]:
    import webdataset

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def transform(image: Image.Image) -> torch.Tensor:
        small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        chw = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
        return chw.float().div_(255).sub_(mean).div_(std)

    def run() -> int:
        stream = webdataset.WebDataset(tars(source), shardshuffle=False).decode("pil").to_tuple("0.jpg")
        return sum(len(transform(image)[None]) for (image,) in stream)

    return run


def main(argv: list[str] | None = None) -> None:
    args = parser("benchmarks.decode", __doc__).parse_args(argv)
    count, pairs = (4, 2) if args.quick else (48, 40)
    torch.set_num_threads(1)
    rows, claimed = [], {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            texts = conversations(np.random.Generator(np.random.PCG64(2)), [4] * count)
            source = prepared(Path(folder), [size], texts, pictures=count) / SOURCE
            sides = ours(source), theirs(source)
            assert [run() for run in sides] == [count, count]
            found = compare(*map(timed, sides), pairs)
            kilobytes = sum(path.stat().st_size for path in source.glob("*.tar")) / count / 1000
        ratio, low, high = found.ratio()
        here, there = found.rates(count)
        row = {
            "image": f"{size[0]} x {size[1]}",
            "KB": round(kilobytes, 1),
            "images/s/core, ours": round(here, 1),
            "webdataset + PIL + float": round(there, 1),
            "ratio": round(ratio, 3),
            "95 %": f"{low:.2f} to {high:.2f}",
        }
        rows.append(row)
        if size == CLAIMED:
            claimed = row
    show(f"JPEG to {SIDE} x {SIDE}, CPU time, {pairs} pairs of {count} images", rows)
    save(
        args,
        "decode",
        claim="JPEGs of 512 x 512 to 336 x 336: at least 3 times webdataset + PIL + float normalisation",
        figure=f"{claimed['ratio']:.2f} times ({claimed['95 %']}): {claimed['images/s/core, ours']:.0f} against "
        f"{claimed['webdataset + PIL + float']:.0f} images/s/core",
        rows=rows,
        packages=("webdataset", "pillow", "simplejpeg", "torch", "numpy"),
        pairs=pairs,
    )


if __name__ == "__main__":
    main()
