"""What needs a GPU to run is still built here, and its operators looked up among those that run there."""

import itertools

import numpy as np
import pytest
import torch
from nvidia.dali import backend

from pipelines import dali, pretext
from pipelines.instance_plan import InstanceView
from pipelines.loading import Source, open_train
from pipelines.plan import View

PATCH = {"Slice", "Rotate", "MultiPaste"}
GRAPHS = [
    dali.Graph(View(size=32), encoded, window, *flags)
    for encoded, window in itertools.product((True, False), ("inside", "pads", "whole"))
    for flags in itertools.product((True, False), repeat=3)
]


def fields(message):
    """(number, value) of every field of a protobuf message."""

    def varint(position):
        value = shift = 0
        while True:
            byte = message[position]
            value |= (byte & 127) << shift
            position, shift = position + 1, shift + 7
            if byte < 128:
                return value, position

    position = 0
    while position < len(message):
        key, position = varint(position)
        if key & 7 == 0:
            value, position = varint(position)
        elif key & 7 == 2:
            length, position = varint(position)
            value, position = message[position : position + length], position + length
        else:
            width = {1: 8, 5: 4}[key & 7]
            value, position = message[position : position + width], position + width
        yield key >> 3, value


def operators(graph, device="gpu"):
    """(name, device) of each operator, in the order they run, from the serialised pipeline."""
    found = []
    serialised = dali.build(graph, device=device, stock=True, batch_size=4, num_threads=1).serialize()
    for _, definition in fields(serialised):
        if not isinstance(definition, bytes) or b"_display_name" not in definition:
            continue
        parts = list(fields(definition))
        name = next(value for number, value in parts if number == 1).decode()
        arguments = [list(fields(value)) for _, value in parts if isinstance(value, bytes) and value[:2] == b"\x0a\x06"]
        (where,) = [argument for argument in arguments if (1, b"device") in argument]
        text = next(v for _, v in where if v in (b"cpu", b"gpu", b"mixed"))
        found.append((name, text.decode()))
    return found


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_every_operator_of_a_gpu_graph_runs_on_a_gpu(graph):
    registered = {
        "cpu": set(backend.RegisteredCPUOps()),
        "gpu": set(backend.RegisteredGPUOps()),
        "mixed": set(backend.RegisteredMixedOps()),
    }
    found = operators(graph)
    for name, device in found:
        assert name in registered[device]
    # On the CPU there is nothing but what comes in (and, for pixels, its way to the GPU).
    assert {name for name, device in found if device == "cpu"} == {"ExternalSource"}
    assert ("decoders__ImageSlice" in dict(found)) == (graph.encoded and graph.window == "inside")
    assert found[-1] == ("CropMirrorNormalize", "gpu")


def test_a_cpu_graph_asks_for_no_gpu():
    for graph in GRAPHS:
        assert {device for _, device in operators(graph, "cpu")} == {"cpu"}


def test_what_is_not_needed_is_left_out():
    least = dali.Graph(View(size=32), encoded=True, window="whole", resizes=False, flips=False, rotates=False)
    assert [name for name, _ in operators(least)] == ["ExternalSource", "decoders__Image", "CropMirrorNormalize"]
    most = dali.Graph(View(size=32), encoded=True, window="inside", resizes=True, flips=True, rotates=True)
    assert {name for name, _ in operators(most)} >= PATCH | {"Resize", "Flip"}


@pytest.mark.parametrize(
    ("task", "render", "turned"), [("none", True, False), ("lorot_e", True, True), ("lorot_e", False, False)]
)
def test_the_patch_operators_are_there_only_for_a_task_that_turns(files, task, render, turned, monkeypatch):
    graphs = []
    make = dali.Renderer
    monkeypatch.setattr(dali, "Renderer", lambda graph, **options: graphs.append(graph) or make(graph, **options))
    source = Source(files, View(size=32), pretext.load(task), 0, render_pretext=render)
    open_train("dali", source, start_step=0, stop_step=1, global_batch=4, micro_batch=4, num_threads=1).close()
    assert graphs[0].rotates == turned


def test_a_batch_is_a_view_of_dalis_memory_and_outlives_the_pipeline(files):
    source = Source(files, View(size=32), pretext.load("lorot_e"), 0)
    kept, copies = [], []
    for batch in open_train("dali", source, start_step=0, stop_step=12, global_batch=8, micro_batch=8, num_threads=1):
        kept.append(batch.images)
        copies.append(batch.images.clone())
    assert len({images.data_ptr() for images in kept}) == 12
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


def test_the_output_is_not_copied():
    graph = dali.Graph(View(size=8), encoded=False, window="whole", resizes=False, flips=False, rotates=False)
    pipeline = dali.build(graph, stock=True, batch_size=2, num_threads=1, prefetch=1)
    pipeline.build()
    pipeline.feed_input("samples", [np.zeros((8, 8, 3), np.uint8)] * 2)
    pipeline.schedule_run()
    (output,) = pipeline.outputs()
    tensor = output.as_tensor()
    assert torch.from_dlpack(tensor).data_ptr() == tensor.data_ptr()


INSTANCE_GRAPHS = [
    dali.InstanceGraph(InstanceView((64,), 100), *flags) for flags in itertools.product((True, False), repeat=3)
]


@pytest.mark.parametrize("graph", INSTANCE_GRAPHS, ids=str)
def test_every_operator_for_images_with_objects_runs_on_a_gpu(graph):
    registered = {
        "cpu": set(backend.RegisteredCPUOps()),
        "gpu": set(backend.RegisteredGPUOps()),
        "mixed": set(backend.RegisteredMixedOps()),
    }
    found = operators(graph)
    assert all(name in registered[device] for name, device in found)
    assert {name for name, device in found if device == "cpu"} == {"ExternalSource"}
    names = [name for name, _ in found]
    # Masks come in at their planned size.
    assert names.count("Resize") == 1
    assert names.count("Flip") == graph.flips * (1 + graph.masks)
    assert names.count("CropMirrorNormalize") == 1
    assert {device for _, device in operators(graph, "cpu")} == {"cpu"}
