"""One sample of a source, read: its record becomes tokens and labels, its files become images. Threads may share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from vlm_nemo.data.augment import augment_image, augment_messages, changes_images, sample_rng
from vlm_nemo.data.chat import Template, encode_conversation
from vlm_nemo.data.config import AugmentConfig
from vlm_nemo.data.features import FeatureStore, image_key
from vlm_nemo.data.image import decode_images, left_out, plan_images
from vlm_nemo.data.layout.images import plan_sizes
from vlm_nemo.data.layout.plan import ImagePlan
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.pieces import EncodedText, image_tokens
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.sample import WRONG_LENGTH, EncodedSample, Record, SampleError, printable
from vlm_nemo.data.storage.folders import Folder
from vlm_nemo.data.tokenizer import Tokenizer


class PlannedSample(NamedTuple):
    """A sample that has its place in a row; its images are still files."""

    position: int
    """In the global order: its identity."""
    source: str
    epoch: int
    record: int
    length: int
    """Tokens, placeholders included."""
    cost: int
    """Patches that the vision tower computes."""
    encoded: EncodedText | None
    """Where the plan had to make it to know the length."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Everything that turns records into samples, the same on every rank."""

    folders: Mapping[str, Folder]
    tokenizer: Tokenizer
    template: Template
    spec: ImageSpec
    augment: AugmentConfig
    seed: int
    """Of the augmentation."""
    features: FeatureStore | None = None
    """What the vision tower made of images before."""

    def text(self, source: str, number: int) -> EncodedText:
        """Tokens and labels of a record. Raises SampleError."""
        return self._text(self.folders[source].record(number))

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens that stand for a record's images, (width, height) pixels each, beside those of its text."""
        return sum(image_tokens(plan, self.tokenizer) for plan in plan_sizes(self.spec, sizes))

    def sample(self, planned: PlannedSample) -> EncodedSample:
        """Read and decode. Raises SampleError: what cannot be used, and a record that is not as long as planned (its
        lengths were made for other data): it would not fit its place in the row."""
        folder = self.folders[planned.source]
        rng = self._rng(planned)
        if planned.encoded is not None and not self.augment.text_dropout:
            text = planned.encoded
        else:
            record = folder.record(planned.record)
            text = self._text(record)
            if len(text.tokens) != planned.length:
                raise SampleError(
                    WRONG_LENGTH,
                    f"{len(text.tokens)} tokens, planned with {planned.length}: the lengths beside the shard are those "
                    "of other data; run `vlm-nemo prepare` again",
                )
            if rng is not None and self.augment.text_dropout:
                changed = self._text(replace(record, messages=augment_messages(record.messages, self.augment, rng)))
                # Less text may, with some tokenizers, take more tokens: then the text stays
                if len(changed.tokens) <= planned.length:
                    text = changed
        sample = EncodedSample(
            tokens=text.tokens, labels=text.labels, images=left_out(text, self.spec), positions=text.positions
        )
        files = folder.images(planned.record)
        augment = None if rng is None else partial(augment_image, cfg=self.augment, rng=rng, resize=torch_resize)
        decode = partial(decode_images, files, text, self.spec, torch_resize, augment)
        if self.features is None:
            return replace(sample, images=decode())
        plans = plan_images(files, self.spec)
        keys = tuple(image_key(data, plan.canvases) for data, plan in zip(files, plans, strict=True))
        # Of another size than the text says: decoding tells
        alike = len(files) == len(text.plans) and all(map(ImagePlan.stands_like, plans, text.plans))
        if files and alike and all(key in self.features for key in keys):
            return replace(sample, image_keys=keys, decode=decode)
        return replace(sample, image_keys=keys, images=decode())

    def name(self, source: str, record: int) -> str:
        """A record's name for logs: shard and member, and its name in the raw data if it can be read."""
        folder = self.folders[source]
        try:
            origin = folder.record(record).source_id
        except SampleError:
            origin = ""
        return printable(f"{folder.key(record)} ({origin})" if origin else folder.key(record))

    def _text(self, record: Record) -> EncodedText:
        plans = plan_sizes(self.spec, record.sizes)
        return encode_conversation(record.messages, self.tokenizer, self.template, plans)

    def _rng(self, planned: PlannedSample) -> np.random.Generator | None:
        """The sample's own generator; None where nothing is drawn from it."""
        if not self.augment.text_dropout and not changes_images(self.augment):
            return None
        return sample_rng(self.seed, planned.source, planned.epoch, planned.record)
