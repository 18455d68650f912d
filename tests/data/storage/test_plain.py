"""Plain tars by position: what webdataset reads is what the index reads; damaged tars are named, none is shortened."""

from __future__ import annotations

import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset

from tests.data.http_server import serve_folder
from tests.data.raw_data import SPEC, add_member, picture, write_img2dataset
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.config import LayoutConfig, StoreConfig
from vlm_nemo.data.layout.images import count_tokens
from vlm_nemo.data.sample import BAD_JSON, BROKEN_IMAGE, EMPTY_CAPTION, IMAGE_SIZE, MISSING_IMAGE, SampleError
from vlm_nemo.data.storage.cache import Cache
from vlm_nemo.data.storage.folders import Folder, open_folder
from vlm_nemo.data.storage.store import LocalFile
from vlm_nemo.types import UserError


def make_cache(folder: Path) -> Cache:
    return Cache(StoreConfig(cache_dir=str(folder / "cache"), tries=20, timeout=0.5, wait=0.001))


def pairs(count: int) -> list[dict[str, bytes]]:
    return [{"jpg": picture(i, (40 + i, 30)), "txt": f" caption {i} ".encode()} for i in range(count)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_img2dataset(tmp_path / "raw", [pairs(7), [], pairs(5)])
    return tmp_path / "raw"


def check_captions(folder: Folder, raw: Path) -> None:
    theirs = list(webdataset.WebDataset(sorted(map(str, raw.glob("*.tar"))), shardshuffle=False, empty_check=False))
    assert len(theirs) == len(folder) == 12
    for i in random.Random(0).sample(range(12), 12):
        record = folder.record(i)
        assert record.messages == [
            {"role": "user", "content": "<image>"},
            {"role": "assistant", "content": theirs[i]["txt"].decode().strip()},
        ]
        assert folder.images(i) == [theirs[i]["jpg"]] and record.kind is None
        assert folder.sizes(i) == record.sizes == [(40 + (i if i < 7 else i - 7), 30)]
        assert folder.key(i) == record.source_id == f"0000{0 if i < 7 else 2}.tar/{theirs[i]['__key__']}"
    assert folder.text_tokens("0" * 12) is None


def test_img2datasets_tars(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_captions(open_folder(str(raw), cache=make_cache(tmp_path)), raw)
    check_captions(open_folder(f"{raw}/0000{{0..2}}.tar", cache=make_cache(tmp_path)), raw)
    assert len(open_folder(f"{raw}/00002.tar", cache=make_cache(tmp_path))) == 5
    monkeypatch.chdir(raw)
    assert len(open_folder("0000{0,2}.tar", cache=make_cache(tmp_path))) == 12
    # The second time nothing but the index is looked at
    monkeypatch.setattr(LocalFile, "read", None)
    assert len(open_folder(str(raw), cache=make_cache(tmp_path))) == 12


def test_the_same_records_as_prepare_makes(tmp_path: Path) -> None:
    from tests.data.raw_data import write_manifest
    from vlm_nemo.data.config import PrepareConfig
    from vlm_nemo.data.prepare.run import prepare

    write_img2dataset(tmp_path / "captions", [pairs(4), pairs(3)])
    manifest = write_manifest(tmp_path, ("captions",))
    prepare(PrepareConfig(manifest=str(manifest), out=str(tmp_path / "out"), workers=1))
    plain = open_folder(str(tmp_path / "captions"), cache=make_cache(tmp_path))
    prepared = open_folder(str(tmp_path / "out" / "captions"))
    assert len(plain) == len(prepared) == 7
    for i in range(7):
        # Facts are for filters and the audit: only prepare keeps them
        assert plain.record(i) == replace(prepared.record(i), facts={}) and plain.images(i) == prepared.images(i)


def test_over_http_on_a_bad_day(raw: Path, tmp_path: Path) -> None:
    with serve_folder(raw) as server:
        server.faulty = 0.1
        check_captions(open_folder(server.url, cache=make_cache(tmp_path)), raw)
        check_captions(open_folder(f"{server.url}/{{00000..00002}}.tar", cache=make_cache(tmp_path)), raw)
        with pytest.raises(UserError, match=r"00003\.tar is not there \(status 404\)$"):
            open_folder(f"{server.url}/{{00000..00003}}.tar", cache=make_cache(tmp_path))
        # A cache that cannot hold the tars
        small = Cache(StoreConfig(cache_dir=str(tmp_path / "s"), cache_gb=1e-6, tries=20, timeout=0.5, wait=0.001))
        check_captions(open_folder(server.url, cache=small), raw)
        nothing = Cache(StoreConfig(cache_dir=str(tmp_path / "n"), cache_gb=0, tries=20, timeout=0.5, wait=0.001))
        check_captions(open_folder(server.url, cache=nothing), raw)


def test_another_signature_finds_what_is_kept(raw: Path, tmp_path: Path) -> None:
    """Signed URLs live for hours, the index and the cache for long."""
    with serve_folder(raw) as server:
        for i, user in enumerate(("", "me:secret@", "")):
            server.requests.clear()
            url = f"{server.url.replace('//', '//' + user)}/?X-Amz-Signature={i}&X-Amz-Expires=60"
            check_captions(open_folder(url, cache=make_cache(tmp_path)), raw)
            read = {name for method, name, _ in server.requests if method == "GET" and name.endswith(".tar")}
            assert len(read) == (0 if i else 3)


def test_what_is_no_sample_counts_nowhere(tmp_path: Path) -> None:
    """A licence, a tool's notes, in the middle of a sample too: the same records as prepare makes of it."""
    from tests.data.raw_data import write_manifest
    from vlm_nemo.data.config import PrepareConfig
    from vlm_nemo.data.prepare.run import prepare

    image = picture(1)
    members = [
        ("LICENSE", b"text"),
        ("__meta__/0.txt", b"x"),
        ("a.jpg", image),
        ("__done__", b""),
        ("README", b""),
    ]
    members += [("a.txt", b"one"), ("b.JPG", image), ("b.txt", b"two"), ("d/LICENSE", b"")]
    write_tar(tmp_path / "captions" / "00000.tar", members)
    manifest = write_manifest(tmp_path, ("captions",))
    prepare(PrepareConfig(manifest=str(manifest), out=str(tmp_path / "out"), workers=1))
    plain = open_folder(str(tmp_path / "captions"), cache=make_cache(tmp_path))
    prepared = open_folder(str(tmp_path / "out" / "captions"))
    assert len(plain) == len(prepared) == 2
    assert [plain.record(i) for i in (0, 1)] == [replace(prepared.record(i), facts={}) for i in (0, 1)]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            add_member(archive, name, data)


def one(tmp_path: Path, *members: tuple[str, bytes]) -> Folder:
    write_tar(tmp_path / "one" / "0.tar", list(members))
    return open_folder(str(tmp_path / "one"), cache=make_cache(tmp_path))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": picture(0), "txt": b"  "}, EMPTY_CAPTION),
        ({"jpg": picture(0)}, EMPTY_CAPTION),
        ({"jpg": picture(0), "json": b"{"}, BAD_JSON),
        ({"jpg": picture(0), "json": b"[1]"}, BAD_JSON),
        ({"jpg": picture(0), "txt": b"\xff\xfe"}, BAD_JSON),
        ({"txt": b"a"}, MISSING_IMAGE),
        ({"jpg": b"<html>", "txt": b"a"}, BROKEN_IMAGE),
        ({"jpg": b"", "txt": b"a"}, BROKEN_IMAGE),
        ({"jpg": picture(0, (4, 4)), "txt": b"a"}, IMAGE_SIZE),
        ({"jpg": picture(0), "json": b'{"messages": [{"role": "user"}]}'}, BAD_JSON),
    ],
)
def test_what_cannot_be_used_keeps_its_number(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    good = [("a.jpg", picture(1)), ("a.txt", b"a")]
    bad = [(f"b.{extension}", data) for extension, data in members.items()]
    folder = one(tmp_path, *good, *bad, ("c.jpg", picture(1)), ("c.txt", b"c"))
    assert len(folder) == 3 and folder.key(1) == "0.tar/b"
    with pytest.raises(SampleError) as caught:
        folder.record(1)
    assert caught.value.reason == reason
    assert folder.record(2).messages[1]["content"] == "c" and folder.sizes(2) == [(40, 30)]


def test_other_members(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "two"}]
    late = picture(3, (70, 50), icc_profile=bytes(200_000))  # its size stands behind 200 KB of colour profile
    folder = one(
        tmp_path,
        ("../../etc/x.PNG", picture(0, form="PNG")),
        ("../../etc/x.cls", b"7"),
        ("README", b"no extension, no sample"),
        ("__index__/x.txt", b"WebDataset's own"),
        ("n.1.jpg", picture(1)),
        ("n.0.jpg", picture(2, (50, 60))),
        ("n.json", json.dumps({"messages": messages, "kind": "k", "source_id": "s"}).encode()),
        ("d/e.f.jpg", late),
        ("d/e.webp", picture(4, (64, 48), form="WEBP")),
        ("d/e.json", b'{"caption": "from json"}'),
        ("e/e.jpeg", late),
        ("e/e.text", b"not looked at"),
        ("e/e.json", b'{"caption": "other folder"}'),
    )
    assert [folder.key(i) for i in range(4)] == ["0.tar/../../etc/x", "0.tar/n", "0.tar/d/e", "0.tar/e/e"]
    assert [folder.record(i).messages[1]["content"] for i in range(4)] == ["7", "two", "from json", "other folder"]
    assert [folder.sizes(i) for i in range(4)] == [[(40, 30)], [(50, 60), (40, 30)], [(64, 48)], [(70, 50)]]
    assert folder.images(1) == [picture(2, (50, 60)), picture(1)]
    assert folder.record(1).kind == "k" and folder.record(1).source_id == "s"


def damaged(whole: bytes, how: str, tar: Path) -> bytes:
    with tarfile.open(tar) as archive:
        offsets = [member.offset for member in archive]
    middle = offsets[len(offsets) // 2]
    if how == "cut at a member":
        return whole[:middle]
    if how == "cut in a member":
        return whole[: middle + 700]
    if how == "no end":
        return whole[: tar_end(tar)]
    data = bytearray(whole)
    data[middle : middle + 100] = {"header": b"\xff" * 100, "zeros": bytes(100)}[how.split()[-1]]
    if how == "block of zeros":
        data[middle : middle + 512] = bytes(512)
    return bytes(data)


def tar_end(tar: Path) -> int:
    with tarfile.open(tar) as archive:
        return max(member.offset_data + -(-member.size // 512) * 512 for member in archive)


@pytest.mark.parametrize("how", ["cut at a member", "cut in a member", "no end", "bad header", "block of zeros"])
def test_a_damaged_tar_is_named_and_counted(raw: Path, tmp_path: Path, how: str) -> None:
    tar = raw / "00002.tar"
    tar.write_bytes(damaged(tar.read_bytes(), how, tar))
    with pytest.raises(UserError, match=r"^\S+00002\.tar is damaged (or cut )?after \d+ members[^\n]*fetch it again"):
        open_folder(str(raw), cache=make_cache(tmp_path))


@pytest.mark.parametrize("name", ["a.pkl", "a.PICKLE", "a.pth", "a.0.pt", "a.pyd"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"0\.tar holds '{name}', a pickle"):
        one(tmp_path, ("a.jpg", picture(0)), (name, b""), ("a.txt", b"a"))


def test_a_tar_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    assert one(tmp_path, ("a.jpg", picture(0)), ("a.txt", b"a")).record(0).messages[1]["content"] == "a"
    folder = one(tmp_path, ("b.jpg", picture(0)), ("b.txt", b"b"))
    assert folder.record(0).messages[1]["content"] == "b" and folder.key(0) == "0.tar/b"


def write_energon(folder: Path, fields: dict[str, str], kind: str, members: list[list[tuple[str, bytes]]]) -> None:
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    counts = {}
    for i, tar in enumerate(members):
        write_tar(folder / f"shard_{i}.tar", tar)
        counts[f"shard_{i}.tar"] = len({name.split(".")[0] for name, _ in tar})
    (meta / "dataset.yaml").write_text(json.dumps({"sample_type": {"__class__": kind}, "field_map": fields}))
    (meta / ".info.json").write_text(json.dumps({"shard_counts": counts}))
    split = {"split_parts": {"train": ["shard_{0..1}.tar"], "val": []}, "exclude": ["shard_1.tar/s1"]}
    (meta / "split.yaml").write_text(json.dumps(split))


def energon_vqa(folder: Path) -> None:
    def sample(key: str, i: int) -> list[tuple[str, bytes]]:
        text = {"q": f"Colour {i}?", "a": [{"answer": "red"}, {"answer": "blue"}, {"answer": "blue"}]}
        return [(f"{key}.jpg", picture(i)), (f"{key}.json", json.dumps(text).encode()), (f"{key}.x", b"unused")]

    tars = [[m for i in range(3) for m in sample(f"s{i}", 10 * t + i)] for t in range(2)]
    write_energon(folder, {"image": "jpg,png", "context": "json[q]", "answers": "json[a]"}, "VQASample", tars)


def check_vqa(folder: Folder) -> None:
    keys = ["shard_0.tar/s0", "shard_0.tar/s1", "shard_0.tar/s2", "shard_1.tar/s0", "shard_1.tar/s2"]
    assert [folder.key(i) for i in range(len(folder))] == keys
    for i, seed in enumerate((0, 1, 2, 10, 12)):
        assert folder.record(i).messages == [
            {"role": "user", "content": f"<image>\nColour {seed}?"},
            {"role": "assistant", "content": "blue"},
        ]
        assert folder.images(i) == [picture(seed)] and folder.sizes(i) == [(40, 30)]


def test_energons_folder_is_read_as_it_is(tmp_path: Path) -> None:
    energon_vqa(tmp_path / "e")
    check_vqa(open_folder(str(tmp_path / "e"), cache=make_cache(tmp_path)))
    with serve_folder(tmp_path / "e") as server:
        server.faulty = 0.1
        check_vqa(open_folder(server.url, cache=make_cache(tmp_path)))
    info = tmp_path / "e" / ".nv-meta" / ".info.json"
    info.write_text(info.read_text().replace("3", "4"))
    with pytest.raises(UserError, match=r"shard_0\.tar holds 3 samples, 4 were counted"):
        open_folder(str(tmp_path / "e"), cache=make_cache(tmp_path))


def test_energons_texts(tmp_path: Path) -> None:
    tars = [[("a.txt", b"one")], [("s1.txt", b"left out"), ("b.txt", b" ")]]
    write_energon(tmp_path / "e", {"text": "txt"}, "TextSample", tars)
    folder = open_folder(str(tmp_path / "e"), cache=make_cache(tmp_path))
    assert len(folder) == 2 and folder.record(0).messages[1]["content"] == "one"
    assert folder.sizes(0) == [] and folder.images(0) == []
    with pytest.raises(SampleError):
        folder.record(1)


def test_a_tar_in_which_prepare_has_not_finished_is_no_plain_tar(prepared: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(prepared / "captions", tmp_path / "captions"))
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="half prepared"):
        open_folder(str(copy), cache=make_cache(tmp_path))
    for index in copy.glob("*.index.*"):  # but a prepared tar alone can be read as it is
        index.unlink()
    plain, whole = open_folder(str(copy), cache=make_cache(tmp_path)), open_folder(str(prepared / "captions"))
    assert len(plain) == len(whole)
    for i in range(len(whole)):
        assert plain.record(i) == replace(whole.record(i), facts={}) and plain.images(i) == whole.images(i)
        assert plain.key(i) == whole.key(i)


def test_the_loader_trains_on_plain_tars(raw: Path, prepared: Path, tmp_path: Path, tokenizer: Any) -> None:
    from vlm_nemo.data.config import DataConfig, PackConfig, SourceConfig
    from vlm_nemo.data.loader import Loader

    cfg = DataConfig(
        sources={"plain": SourceConfig(path=str(raw))},
        tokenizer=str(prepared / "tokenizer"),
        template="short",
        pack=PackConfig(capacity=128, pool=4),
        global_packs=2,
        store=StoreConfig(cache_dir=str(tmp_path / "cache")),
    )
    assert "short" in TEMPLATES and count_tokens(SPEC, [(40, 30)]) == 4
    loader = Loader(cfg, SPEC, tokenizer, seed=1, max_tokens=128, dp_rank=0, dp_size=1)
    try:
        seen: list[int] = []
        while len(seen) < 12:
            step = loader.next()
            seen += [key for row in step.keys for key in row]
            assert not step.planned_drops and not step.local_drops
    finally:
        loader.close()
    assert len(set(seen)) == len(seen)


def test_half_a_surrogate_pair_drops_one_sample(raw: Path, tmp_path: Path, prepared: Path) -> None:
    """JSON can hold what no tokenizer takes: found where a text becomes tokens, and where lengths are measured."""
    from vlm_nemo.data.lengths import measure
    from vlm_nemo.data.sample import REASONS
    from vlm_nemo.data.tokenizer import Tokenizer

    bad = {"jpg": picture(1), "json": json.dumps({"caption": "red \ud83d"}).encode()}
    write_img2dataset(tmp_path / "half", [[*pairs(1), bad]])
    folder = open_folder(str(tmp_path / "half"), cache=make_cache(tmp_path))
    tokenizer = Tokenizer(prepared / "tokenizer")
    with pytest.raises(SampleError, match="half a surrogate pair") as error:
        tokenizer.encode("red \ud83d")
    assert error.value.reason == BAD_JSON
    records = []
    for i in range(2):
        try:
            records.append(folder.record(i))
        except SampleError as found:
            records.append(found)
    lengths = measure(records, tokenizer, TEMPLATES["plain"], LayoutConfig())
    assert lengths[0] > 0 and lengths[1] == -1 - REASONS.index(BAD_JSON)
