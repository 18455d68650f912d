"""Records a CPU second: small samples (a conversation and an image of about 1 KB) out of shards, nothing decoded.

ours    the index says where a record lies; one pread for its JSON, one for its image
theirs  webdataset goes through the tar; its JSON decoder, images as bytes

Both give the parsed conversation and the bytes of the image of every record, in the order of the shards; ours checks
the conversation's form too. Ours is measured in a random order as well, which webdataset cannot do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.made import SOURCE, conversations, prepared, tars
from benchmarks.paired import compare, timed
from benchmarks.report import parser, save, show
from vlm_nemo.data.storage.shards import ShardFolder


def ours(source: Path, order: Sequence[int]) -> Callable[[], int]:
    folder = ShardFolder(str(source))

    def run() -> int:
        read = 0
        for number in order:
            record, images = folder.record(number), folder.images(number)
            read += len(record.messages) + len(images[0])
        return read

    return run


def theirs(source: Path) -> Callable[[], int]:
    import webdataset

    def run() -> int:
        read = 0
        stream = webdataset.WebDataset(tars(source), shardshuffle=False).decode(only=["json"])
        for sample in stream:
            read += len(sample["json"]["messages"]) + len(sample["0.jpg"])
        return read

    return run


def main(argv: list[str] | None = None) -> None:
    args = parser("benchmarks.records", __doc__).parse_args(argv)
    count, pairs = (200, 2) if args.quick else (2000, 40)
    rng = np.random.Generator(np.random.PCG64(3))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = prepared(Path(folder), [(24, 24)], conversations(rng, [10] * count), pictures=50) / SOURCE
        kilobytes = sum(path.stat().st_size for path in source.glob("*.tar")) / count / 1000
        baseline = theirs(source)
        for name, order in (("of the shards", list(range(count))), ("random", rng.permutation(count).tolist())):
            run = ours(source, order)
            assert run() == baseline(), "both read the same"
            found = compare(timed(run), timed(baseline), pairs)
            ratio, low, high = found.ratio()
            here, there = found.rates(count)
            rows.append(
                {
                    "our order": name,
                    "records/s/core, ours": round(here),
                    "webdataset": round(there),
                    "ratio": round(ratio, 3),
                    "95 %": f"{low:.2f} to {high:.2f}",
                }
            )
    show(f"records of {kilobytes:.1f} KB in the tar, CPU time, {pairs} pairs of {count} records", rows)
    first = rows[0]
    save(
        args,
        "records",
        claim="Small records: at least 10 times webdataset's records a CPU second",
        figure=f"{first['ratio']:.1f} times ({first['95 %']}): {first['records/s/core, ours']:,} against "
        f"{first['webdataset']:,} records/s/core",
        rows=rows,
        packages=("webdataset", "numpy", "safetensors"),
        pairs=pairs,
        kilobytes=round(kilobytes, 2),
    )


if __name__ == "__main__":
    main()
