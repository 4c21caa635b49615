"""schemathesis: requests made from the server's own OpenAPI schema, right and wrong ones, and what it answers."""

import time
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from hovle_serve.access import Access
from hovle_serve.api import create_app
from hovle_serve.engine import Engine

load_all_checks()


def checked(operation, mode: GenerationMode, examples: int, statuses: Counter[str]) -> None:
    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case) -> None:
        # What the schema allows may still be no picture, or too long for the model.
        response = case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=120)
        statuses[f"{operation.label} {response.status_code}"] += 1

    check()


def test_names_of_models_are_for_who_has_a_key(model, processor):
    with Engine(model, processor) as engine:
        for keys in ((), ("secret",)):
            document = create_app(engine, "tiny/hovle", Access(keys)).openapi()
            assert ("tiny/hovle" in str(document)) == (not keys)


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_answers_are_what_the_schema_says(model, processor, examples):
    statuses = Counter[str]()
    with Engine(model, processor, max_cache_tokens=60) as engine:
        schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, "tiny"))
        for found in schema.get_all_operations():
            operation = found.ok()
            checked(operation, GenerationMode.POSITIVE, examples, statuses)
            if operation.body:  # nothing else can be wrong about a request here
                checked(operation, GenerationMode.NEGATIVE, examples, statuses)
        deadline = time.monotonic() + 60  # a place is free a moment after the last token went out
        while engine.num_active or engine.num_waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    print(dict(statuses))
    assert statuses["POST /v1/chat/completions 200"]
    assert statuses["POST /v1/chat/completions 400"]
