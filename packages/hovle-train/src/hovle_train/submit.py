"""`hovle submit`: `hovle train` as a job on a Ray cluster that needs none of our packages installed.

A thin wrapper of Ray's job submission. The job's working directory carries the resolved recipe and every installed
package with plugins, with its metadata, as it is here: entry points are found there as from site-packages. What those
packages depend on (torch, transformers, ray, ...) is the cluster's image's to have.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from importlib.metadata import Distribution, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hovle_core.plugins import GROUP

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from hovle_train.config import Recipe
    from hovle_train.pipeline import Pipeline

JOB_FILE = "job.yaml"
# Set on the cluster as they are here; a tracker's key and hub ids' cache are the user's to pass with --env.
PASSED_ON = ("HOVLE_PLUGINS", "HOVLE_DEBUG", "HF_HUB_OFFLINE", "WANDB_MODE", "OMP_WAIT_POLICY")
POLL_S = 1.0
# What a head takes at most, on a busy machine, until its agent answers.
AGENT_SECONDS = 60.0


def add_submit_parser(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `hovle submit` to the sub-parsers."""
    from hovle_train.commands import add_recipe_arguments

    parser = cli.add_parser("submit", help="run `hovle train` as a job on a Ray cluster, with these packages")
    add_recipe_arguments(parser)
    parser.add_argument("--address", help="the cluster's dashboard, such as http://head:8265 "
                        "(default: RAY_API_SERVER_ADDRESS)")  # fmt: skip
    parser.add_argument("--submission-id", help="name of the job (default: Ray makes one up)")
    parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE",
                        help="environment variable of the job (may be repeated)")  # fmt: skip
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job's log")
    parser.set_defaults(run=run_submit)


def run_submit(args: argparse.Namespace) -> int:
    """Exit code: that of `hovle train` on the cluster; with `--no-wait`, 0 once it is submitted."""
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    from hovle_train.commands import check_recipes, load
    from hovle_train.pipeline import Pipeline

    environment = _environment(args.env)
    job = load(args, args.plugins.registry)
    stretch = []
    recipes = {job.stage.name: job} if not isinstance(job, Pipeline) else job.select(args.first, args.last)
    check_recipes(recipes, args.plugins, elsewhere=True)  # a mistake is found here and not on the cluster
    if isinstance(job, Pipeline):
        for flag, label in (("--from", args.first), ("--until", args.last)):
            stretch += [flag, label] if label is not None else []
    address = args.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if address is None:
        raise ValueError("no cluster named: give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise ValueError(f"--address {address}: {error} (it looks like http://HEAD:8265)") from None
    with tempfile.TemporaryDirectory(prefix="hovle-submit-") as folder:
        pack_workspace(Path(folder), job)
        submission_id = _submit(
            client,
            entrypoint=" ".join(["python -m hovle_core.cli train", JOB_FILE, *stretch]),
            submission_id=args.submission_id,
            runtime_env={"working_dir": folder, "env_vars": environment},
        )
    print(f"submitted {submission_id} to {address}", flush=True)
    if args.no_wait:
        return 0
    return follow(client, submission_id)


def _submit(client: JobSubmissionClient, **job: Any) -> str:
    """Submit, and wait for a head that has just started until it has somebody to take jobs."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def _environment(given: list[str]) -> dict[str, str]:
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"--env {pair!r} must read KEY=VALUE")
        environment[name] = value
    return environment


def pack_workspace(folder: Path, job: Recipe | Pipeline) -> None:
    """Fill a job's working directory: `job.yaml`, and each distribution with plugins as package and metadata.

    Paths that exist here are written down as absolute: they must lead to the same things on the cluster.
    """
    for distribution, packages in plugin_distributions().items():
        for package in packages:
            _copy_package(package, folder)
        metadata = folder / f"{distribution.name.replace('-', '_')}-{distribution.version}.dist-info"
        metadata.mkdir()
        for name in ("METADATA", "entry_points.txt"):
            (metadata / name).write_text(distribution.read_text(name) or "")
    (folder / JOB_FILE).write_text(_absolute(job).to_yaml())


def plugin_distributions() -> dict[Distribution, list[str]]:
    """Each installed distribution with plugins, and their top-level packages."""
    found: dict[str, tuple[Distribution, set[str]]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.dist is None:
            raise ValueError(
                f"plugin {entry.name!r} belongs to no installed distribution: install it with pip"
            )
        _, packages = found.setdefault(entry.dist.name, (entry.dist, set()))
        packages.add(entry.module.partition(".")[0])
    return {distribution: sorted(packages) for distribution, packages in found.values()}


def _copy_package(package: str, folder: Path) -> None:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"package {package!r} of a plugin is not importable here, and cannot be sent along")
    if spec.submodule_search_locations is None:  # a plain module
        shutil.copy(spec.origin, folder)
        return
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(Path(spec.origin).parent, folder / package, ignore=ignored)


def _absolute(job: Recipe | Pipeline) -> Recipe | Pipeline:
    from hovle_train.lineage import absolute
    from hovle_train.pipeline import Pipeline

    if not isinstance(job, Pipeline):
        return absolute(job)
    folders = {recipe.run_dir: str(recipe.path.resolve()) for recipe in job.recipes.values()}
    recipes = {}
    for label, recipe in job.recipes.items():
        # A parent that has yet to be trained is no path that exists here.
        if recipe.model.init_from in folders:
            recipe.model.init_from = folders[recipe.model.init_from]
        if recipe.model.backbone is not None and recipe.model.backbone.options.get("path") in folders:
            recipe.model.backbone.options["path"] = folders[recipe.model.backbone.options["path"]]
        recipes[label] = absolute(recipe)
    return Pipeline(job.run_dir.resolve(), recipes)


def follow(client: JobSubmissionClient, submission_id: str) -> int:
    """Print a job's log as it comes and, at its end, its state; returns its exit code, 1 where it has none.

    Ctrl-C leaves the job running and says how to stop it. Raises ValueError where the connection is lost.
    """
    try:
        asyncio.run(_print_log(client, submission_id))
        while not (status := client.get_job_status(submission_id)).is_terminal():
            time.sleep(POLL_S)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"lost sight of {submission_id}, which may go on: {error}; see ray job status"
        ) from None
    except KeyboardInterrupt:
        print(f"\n{submission_id} goes on; stop it with: ray job stop {submission_id}", flush=True)
        raise
    info: Any = client.get_job_info(submission_id)
    print(f"{submission_id}: {status.value}" + (f" ({info.message})" if info.message else ""), flush=True)
    if status.value == "SUCCEEDED":
        return 0
    return int(info.driver_exit_code or 1)


async def _print_log(client: JobSubmissionClient, submission_id: str) -> None:
    async for lines in client.tail_job_logs(submission_id):
        print(lines, end="", flush=True)
