"""Conformance of datasets: `len(source)` and `source[i] -> Sample`, in the same order for ever."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from hovle_core.images import decode_image
from hovle_core.registry import Registry
from hovle_core.testing.conformance.base import SpecTests, build


class DatasetTests(SpecTests):
    """A source of samples. Looks at the first `num_looked_at`."""

    kind = "dataset"
    num_looked_at: ClassVar[int] = 64

    def samples(self, source: Any) -> list[Any]:
        return [source[i] for i in range(min(len(source), self.num_looked_at))]

    def test_holds_samples(self, subject: Any) -> None:
        """The order of training is computed from the number of samples."""
        assert len(subject) > 0, "the source is empty"
        for i, sample in enumerate(self.samples(subject)):
            missing = [a for a in ("key", "images", "text", "messages", "validate") if not hasattr(sample, a)]
            assert not missing, (
                f"sample {i} is a {type(sample).__name__} without {missing}: return a hovle_data.schema.Sample"
            )
            assert sample.validate() is sample

    def test_pictures_can_be_decoded(self, subject: Any) -> None:
        """Pictures travel as encoded files and are decoded the same way in training, chat and serving."""
        for sample in self.samples(subject):
            for image in sample.images:
                assert isinstance(image, bytes), (
                    f"{sample.key}: a picture is {type(image).__name__}, not file bytes"
                )
                decode_image(image)  # its error says what is wrong

    def test_keys_are_unique(self, subject: Any) -> None:
        """Quarantine and cached teacher features know a sample by its key alone."""
        keys = [sample.key for sample in self.samples(subject)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        assert not twice, f"these keys name several samples: {twice[:3]}"

    def test_ends_where_it_says(self, subject: Any) -> None:
        """Whoever iterates stops at IndexError; a source that wraps around would never end."""
        try:
            subject[len(subject)]
        except IndexError:
            return
        raise AssertionError("source[len(source)] gives a sample instead of IndexError")

    def test_resumes_where_it_was(self, subject: Any, registry: Registry, arguments: dict[str, Any]) -> None:
        """A resumed run, and every worker, opens the source anew and reads from the middle."""
        before = self.samples(subject)
        again = build(registry, self.kind, self.name, arguments)
        assert len(again) == len(subject), f"opened again it has {len(again)} samples, not {len(subject)}"
        for i in reversed(range(len(before))):
            assert again[i] == before[i], (
                f"sample {i} is another one when it is read first: is the order sorted?"
            )

    def test_threads_read_the_same(self, subject: Any) -> None:
        """`data.num_threads` changes speed and no result: two reads share nothing, such as a place in a file."""
        before = self.samples(subject)
        order = [*range(len(before)), *reversed(range(len(before)))] * 2
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(subject.__getitem__, order))
        wrong = {i for i, sample in zip(order, read, strict=True) if sample != before[i]}
        assert not wrong, f"read from several threads, samples {sorted(wrong)[:5]} come out differently"
