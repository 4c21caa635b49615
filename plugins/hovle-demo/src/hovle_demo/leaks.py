"""Nothing held out may be trained on: checked on the samples themselves, whatever made them."""

import io
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from hovle_data.schema import Sample
from hovle_demo.picture import pixel_digest


def check_no_leak(
    sets: Mapping[str, Sequence[Sample]], train: Iterable[str], held_out: Iterable[str]
) -> None:
    """Raises ValueError naming two samples if a held-out picture or paragraph lies in a training set.

    Pictures are compared by their pixels. Captions and answers may repeat ("a blue circle"), paragraphs may not.
    """
    digests: dict[bytes, str] = {}

    def looks(sample: Sample) -> list[str]:
        for png in sample.images:
            if png not in digests:
                with Image.open(io.BytesIO(png)) as image:
                    digests[png] = pixel_digest(image)
        return [digests[png] for png in sample.images]

    unseen: dict[str, str] = {}
    for name in held_out:
        for sample in sets[name]:
            for look in looks(sample):
                unseen.setdefault(look, f"{name}/{sample.key}")
            if sample.kind == "text" and sample.text:
                unseen.setdefault(sample.text, f"{name}/{sample.key}")
    for name in train:
        for sample in sets[name]:
            for content in (*looks(sample), sample.text or ""):
                if content in unseen:
                    raise ValueError(
                        f"the held-out sample {unseen[content]} is also the training sample {name}/{sample.key}; "
                        "the splits of hovle-demo are broken, do not train on them"
                    )
