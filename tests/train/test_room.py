"""What a run asks of Ray against what nodes have."""

import pytest

from hovle_train.room import cores_a_worker, requests, without_room


def node(labels=None, alive=True, **resources):
    own = {"memory": 1e9, "object_store_memory": 1e9, "node:192.0.2.1": 1.0}
    return {"Alive": alive, "Resources": {**resources, **own}, "Labels": labels or {}}


GPUS = [node(CPU=16, GPU=4, **{"accelerator_type:H100": 1}, labels={"pool": "train"}), node(CPU=8, teacher=1)]


@pytest.mark.parametrize(
    ("resources", "lacks"),
    [
        ({"num_workers": 4, "use_gpu": True}, None),
        ({"num_workers": 5, "use_gpu": True}, "5 workers (resources) with CPU 1, GPU 1 each"),
        ({"num_workers": 2, "use_gpu": True, "accelerator_type": "H100"}, None),
        ({"num_workers": 1, "use_gpu": True, "accelerator_type": "A100"}, "accelerator_type:A100"),
        ({"num_workers": 1, "custom": {"teecher": 1}}, "teecher 1"),
        ({"num_workers": 1, "labels": {"pool": "train"}}, None),
        ({"num_workers": 1, "labels": {"pool": "trian"}}, "label pool=trian"),
        ({"num_workers": 1, "labels": {"pool": "!in(train)"}}, None),  # Ray knows its operators
        ({"num_workers": 1, "teacher_pool": {"custom": {"teacher": 1}}}, None),
        ({"num_workers": 1, "teacher_pool": {"actors": 2, "custom": {"teacher": 1}}}, "2 teachers"),
    ],
)
def test_what_no_node_has_is_found(make_recipe, resources, lacks):
    stage = "distillation" if "teacher_pool" in resources else "alignment"
    request = without_room(requests(make_recipe(stage, resources=resources), 1), GPUS)
    assert (request is None) if lacks is None else lacks in str(request)


def test_a_node_that_is_gone_has_nothing(make_recipe):
    asked = requests(make_recipe("alignment"), 1)
    assert without_room(asked, [node(CPU=4, alive=False)]) is asked[0]


@pytest.mark.parametrize(
    ("resources", "nodes", "cores"),
    [
        ({"num_workers": 2}, [node(CPU=8)], 4),
        ({"num_workers": 2}, [node(CPU=4), node(CPU=4)], 4),
        ({"num_workers": 1}, [node(CPU=1), node(CPU=1), node(CPU=1)], 1),  # not three: no node has them
        ({"num_workers": 1, "teacher_pool": {"cpus": 1}}, [node(CPU=2)], 1),
        ({"num_workers": 1, "teacher_pool": {"actors": 5, "cpus": 0.4}}, [node(CPU=8)], 6),
        ({"num_workers": 3}, [node(CPU=2)], 1),
        ({"num_workers": 2, "use_gpu": True}, [node(CPU=8)], 4),  # GPUs are to come
    ],
)
def test_workers_share_the_cores_that_there_are(make_recipe, resources, nodes, cores):
    stage = "distillation" if "teacher_pool" in resources else "alignment"
    assert cores_a_worker(make_recipe(stage, resources=resources), nodes) == cores
