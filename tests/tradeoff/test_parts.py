"""The parts of ``came8bit tradeoff``: presets, data, measures, noise."""

import json
import math
import string
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_images import write_fashion_mnist

import came8bit
from came8bit.param_groups import ADAPM, groups_by_rule
from came8bit.tradeoff import config
from came8bit.tradeoff.config import OPTIMIZERS, PRESETS, TASKS, preset_config
from came8bit.tradeoff.data import (
    Images,
    Windows,
    eval_items,
    load_images,
    load_mails,
    load_text,
    split_text,
    train_items,
)
from came8bit.tradeoff.measure import PeakMemory, state_bytes, wide_fraction
from came8bit.tradeoff.models import build_model
from came8bit.tradeoff.rules import RULES
from came8bit.tradeoff.study import Study
from came8bit.tradeoff.train import RunResult

# ---- presets ----


def test_quick_preset_keeps_its_promises():
    config = preset_config("quick")
    (task,) = config.tasks
    assert len(config.seeds) >= 2
    assert task.steps >= 200
    assert not config.tune
    with torch.device("meta"):
        model = build_model(task)
    assert wide_fraction(model) >= 0.8
    with pytest.raises(AssertionError):  # the measure can say no
        assert wide_fraction(torch.nn.Linear(1000, 255)) >= 0.8


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_build(name):
    for task in preset_config(name).tasks:
        assert task.width % task.heads == 0
        with torch.device("meta"):
            assert wide_fraction(build_model(task)) >= 0.8


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_parameter_of_a_task_gets_a_gradient(task):
    from came8bit.tradeoff.models import MODELS

    small = dict(width=32, heads=task.heads and 4, layers=min(task.layers, 1))
    task = replace(task, **small, context=task.context and 16)
    model = build_model(task)
    if task.data == "text":
        inputs = targets = torch.randint(256, (2, task.context))
    elif task.data == "mails":
        inputs, targets = torch.randint(1, 30522, (2, 16)), torch.randint(2, (2,))
    elif task.data == "images":
        inputs, targets = torch.randn(2, 1, 28, 28), torch.randint(10, (2,))
    else:
        inputs, targets = torch.rand(2, 2, 28, 28), torch.randn(2, 1, 28, 28)
    losses, right = MODELS[task.model].losses(model, inputs, targets)
    assert losses.shape == (2,)
    assert (right is None) == (task.data == "noised images")
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_every_arm_can_be_built_and_says_how():
    for name, spec in OPTIMIZERS.items():
        if config.why_unavailable(name) is None:
            assert spec.build(torch.nn.Linear(4, 4), 1e-3, 0.0).param_groups[0]["lr"] == 1e-3
            assert spec.call.startswith(spec.path + "(")
    assert OPTIMIZERS["came8bit"].options["optim_bits"] == 8


def small_model(name):
    task = replace(TASKS[name], width=32, heads=4, layers=1)
    return build_model(replace(task, context=task.context and 16))


@pytest.mark.parametrize(
    ("task", "values", "outputs", "embeddings"),
    [
        ("text", "attn.c_attn", "attn.c_proj", {"wte", "wpe"}),
        ("llama", "self_attn.v_proj", "self_attn.o_proj", {"embed_tokens"}),
        ("vision", "attention.v_proj", "attention.o_proj", set()),
        (
            *("minilm", "attention.self.value", "attention.output.dense"),
            {f"{kind}_embeddings" for kind in ("word", "position", "token_type")},
        ),
    ],
)
def test_the_groups_of_adapm_in_every_model(task, values, outputs, embeddings):
    """Values keep all momentum, embeddings and the output of attention none."""
    model = small_model(task)
    optimizer = OPTIMIZERS["came-adapm"].build(model, 1e-3, 0.0)
    found = {}
    for group in optimizer.param_groups:
        found |= dict.fromkeys(group["param_names"], group["optim_bits"])
    assert found.keys() == {name for name, _ in model.named_parameters()}

    def bits(name):
        layer = name.rpartition(".")[0]
        if layer.endswith(values):
            return 32
        out = layer.endswith(outputs) or layer.rpartition(".")[2] in embeddings
        return 0 if out else 4

    assert found == {name: bits(name) for name in found}
    assert sum(found[name] == 32 for name in found if name.endswith("weight")) == 1
    assert sum(found[name] == 0 for name in found if name.endswith("weight")) == 1 + len(embeddings)


def test_the_groups_of_adapm_are_those_of_the_package():
    """On Llama, whose names the package's rules have."""
    model = small_model("llama")
    assert groups_by_rule(model, RULES["ADAPM"]) == groups_by_rule(model, ADAPM)
    assert "groups_by_rule(model, ADAPM)" in OPTIMIZERS["came-adapm"].call


# ---- data ----


def test_the_split_is_contiguous_and_does_not_leak():
    data = split_text(b"a" * 900 + b"b" * 50 + b"c" * 50, {})
    task = replace(PRESETS["quick"].tasks[0], context=4, steps=50, batch_size=2, eval_items=100)
    for items, letter in (
        (train_items(data, task, seed=0), "a"),
        (eval_items(data, task, "tune"), "b"),
        (eval_items(data, task, "validation"), "c"),
    ):
        seen = {int(value) for window in items for part in window for value in part}
        assert seen == {ord(letter)}


def test_windows_predict_the_next_byte_and_evaluation_windows_do_not_overlap():
    text = string.printable.encode() * 40
    data = split_text(text, {})
    task = replace(PRESETS["quick"].tasks[0], context=10, batch_size=4, eval_items=1000)
    items = eval_items(data, task, "validation")
    assert isinstance(items, Windows)
    assert len(items) == 16  # of 200 bytes: 19 windows with a target each, in whole batches
    covered = []
    for inputs, targets in items:
        assert inputs.tolist()[1:] == targets.tolist()[:-1]
        covered.append(bytes(targets.tolist()))
    tail = text[-200:]
    places = [tail.find(piece) for piece in covered]
    assert len(covered) == 16
    assert all(place >= 0 for place in places)


def test_training_windows_depend_on_the_seed_alone():
    data = split_text(bytes(range(256)) * 20, {})
    task = replace(PRESETS["quick"].tasks[0], context=8, steps=5, batch_size=2)

    def first_inputs(seed):
        return torch.stack([window[0] for window in train_items(data, task, seed)])

    assert torch.equal(first_inputs(3), first_inputs(3))
    assert not torch.equal(first_inputs(3), first_inputs(4))
    assert first_inputs(3).shape == (10, 8)


def test_the_standard_library_is_text_that_every_machine_has():
    one = load_text(None, "stdlib", Path("nowhere"))
    two = load_text(None, "stdlib", Path("nowhere"))
    assert one.about == two.about
    assert one.about["bytes"] > 3_000_000
    assert len(one.train) + len(one.tune) + len(one.validation) == one.about["bytes"]


def test_files_are_joined_in_the_order_given(tmp_path):
    for name, content in (("b.txt", b"second"), ("a.txt", b"first")):
        (tmp_path / name).write_bytes(content)
    text = load_text([tmp_path / "b.txt", tmp_path / "a.txt"], "stdlib", tmp_path)
    whole = np.concatenate([text.train, text.tune, text.validation]).tobytes()
    assert whole == b"second\nfirst"


def test_images_are_split_apart(tmp_path):
    write_fashion_mnist(tmp_path / "fashion-mnist")
    data = load_images(tmp_path)
    assert isinstance(data, Images)
    assert [len(part[1]) for part in (data.train, data.tune, data.validation)] == [200, 5000, 40]
    task = replace(TASKS["vision"], steps=10, batch_size=50, eval_items=40)
    items = train_items(data, task, seed=0)
    assert len(items) == 500  # two and a half passes over 200
    image, label = items[0]
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.float32
    assert -1 <= float(image.min()) <= float(image.max()) <= 1
    assert 0 <= int(label) < 10


def test_noised_images_depend_on_seed_and_position_alone(tmp_path):
    write_fashion_mnist(tmp_path / "fashion-mnist")
    data = load_images(tmp_path)
    task = replace(TASKS["ddpm"], steps=4, batch_size=16, eval_items=32)
    items = [train_items(data, task, seed) for seed in (0, 0, 1)]
    one, two, other = ([part.clone() for part in each[5]] for each in items)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[1], other[1])
    inputs, noise = eval_items(data, task, "validation")[3]
    assert inputs.shape == (2, 28, 28)
    assert noise.shape == (1, 28, 28)
    time = inputs[1].unique()
    assert len(time) == 1
    assert 0 <= float(time) < 1
    # What is left of the image, once the noise is taken out, is the image: in [−1, 1].
    kept = float(type(items[0])._KEPT[round(1000 * float(time))])
    image = (inputs[:1] - (1 - kept) ** 0.5 * noise) / kept**0.5
    assert image.abs().max() <= 1 + 1e-3 / kept**0.5


def write_mails(folder, weights):
    """Write 40 mails of one word each, a tokenizer that knows two words, and a model's weights."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    for name in ("mails", "minilm"):
        (folder / name).mkdir(parents=True)
    lines = [
        json.dumps({"text": "buy" if i % 2 else "hello", "spam": i % 2 > 0}) for i in range(40)
    ]
    (folder / "mails" / "mails.jsonl").write_text("\n".join(lines))
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "hello": 5, "buy": 7}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "minilm" / "tokenizer.json"))
    save_file(weights, folder / "minilm" / "model.safetensors")


def test_mails_are_tokens_and_train_a_pretrained_model(tmp_path):
    task = replace(TASKS["minilm"], width=48, layers=1, context=8, batch_size=2, steps=2)
    weights = {
        name.removeprefix("bert."): value.detach().clone()
        for name, value in build_model(task).state_dict().items()
        if name.startswith("bert.")
    }
    write_mails(tmp_path, weights)
    data = load_mails(tmp_path)
    assert [len(part[1]) for part in (data.train, data.tune, data.validation)] == [28, 6, 6]
    tokens, label = eval_items(data, task, "validation")[0]
    assert tokens.tolist() == [5, 0, 0, 0, 0, 0, 0, 0]
    assert int(label) == 0
    model = build_model(task, data.weights)
    name, value = next(iter(weights.items()))
    assert torch.equal(model.bert.get_parameter(name), value)
    # What follows the end of a mail is not looked at.
    other = build_model(replace(task, context=1), data.weights)
    other.classifier.load_state_dict(model.classifier.state_dict())
    one, two = (m(tokens[None, :n]).logits for m, n in ((model, 8), (other, 1)))
    torch.testing.assert_close(one, two)
    with pytest.raises(ValueError, match="got no weights for bert"):
        build_model(replace(task, layers=2), data.weights)
    with pytest.raises(ValueError, match="run `make data`"):
        load_mails(tmp_path / "minilm")


# ---- measures ----


def parameters(*shapes):
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def stepped(make, params):
    optimizer = make(params)
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_has_eight_bytes_and_a_step_count(fused):
    params = parameters((300, 400), (400,))
    counted = state_bytes(stepped(lambda p: torch.optim.AdamW(p, fused=fused), params))
    assert counted.total == 8 * (300 * 400 + 400) + 4 * 2
    assert counted.by_dtype == {"float32": counted.total}
    assert counted.python_numbers == 0


def test_tables_that_parameters_share_count_once():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = parameters((256, 256), (512, 256))
    elements = 256 * 256 + 512 * 256
    counted = state_bytes(stepped(bitsandbytes.optim.AdamW8bit, params))
    blocks = elements // 256
    assert counted.total == 2 * elements + 2 * 4 * blocks + 2 * 256 * 4
    assert counted.by_dtype["uint8"] == 2 * elements
    assert counted.python_numbers == 2  # its step counts


def test_came8bit_has_one_byte_and_its_statistics():
    params = parameters((512, 768), (100,))
    counted = state_bytes(stepped(came8bit.CAME8bit, params))
    codes, blocks = 512 * 768, 512 * 3
    factored = codes + 4 * blocks + 4 * 2 * (512 + 768) + 4 + 8 + 8  # rms_ratio, step, skipped
    unfactored = 8 * 100 + 8 + 8
    assert counted.total == factored + unfactored
    assert counted.by_dtype["int8"] == codes


def test_views_count_their_whole_storage_once():
    params = parameters((4,), (4,))
    optimizer = torch.optim.SGD(params, lr=1.0)
    buffer = torch.zeros(100)
    optimizer.state[params[0]] = {"half": buffer[:4], "nested": [{"more": buffer[4:8]}], "n": 3}
    optimizer.state[params[1]] = {"half": buffer[8:12], "flag": True, "none": None, "name": "x"}
    counted = state_bytes(optimizer)
    assert counted.total == 400
    assert counted.python_numbers == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_is_touched_and_given_back():
    memory = PeakMemory(torch.device("cpu"))
    size = 64 * 2**20
    touched = torch.ones(size, dtype=torch.uint8)
    del touched
    above = memory.above_start()
    assert above is not None
    assert size * 0.95 < above < size * 1.3
    assert PeakMemory(torch.device("cpu")).above_start() < size / 4  # and is set back


# ---- the search ----


@pytest.mark.parametrize(("best", "count"), [(2e-3, 3), (1.6e-2, 6), (2.5e-4, 6), (1e3, 10)])
def test_a_search_goes_on_until_its_optimum_is_inside(best, count):
    config = replace(preset_config("quick"), tune=True, optimizers=("came",), seeds=(0,))
    study = Study(config)
    for spec in study.plan():  # it looks at the runs before it goes on
        assert len(list(study.plan())) > len(study.runs)  # and can be asked at any time
        run = RunResult.of(spec)
        run.status, run.loss = "ok", abs(math.log(spec.lr / best))
        study.runs.append(run)
    tried = sorted({run.lr for run in study.of("tune", "text", "came")})
    assert len(tried) == count
    assert tried == pytest.approx([tried[0] * 2**i for i in range(count)])
    lr = study.learning_rate("text", "came")
    assert [run.lr for run in study.of("final", "text", "came")] == [lr]
    assert study.at_edge("text", "came") == (count == 10)
    if count < 10:
        assert lr == pytest.approx(best)


def test_rungs_and_ports_take_the_learning_rate_of_their_rule():
    """They are never searched for, and run at what the search of their leader finds."""
    names = ("adamw", "came-published", "came-pytorch", "came2bit")
    config = replace(preset_config("quick"), tune=True, optimizers=names, seeds=(0,))
    study = Study(config)
    for spec in study.plan():
        run = RunResult.of(spec)
        run.status, run.loss = "ok", abs(math.log(spec.lr / 2e-4))
        study.runs.append(run)
    searched = {run.optimizer for run in study.runs if run.purpose == "tune"}
    assert searched == {"adamw", "came-published", "came2bit"}  # whose leader, came, is not run
    assert study.learning_rate("text", "came-pytorch") == 2e-4
    given = replace(config, rates={"came-published": 3e-4})
    assert Study(given).learning_rate("text", "came-pytorch") == 3e-4
    own = replace(given, rates={"came-pytorch": 5e-4})
    assert Study(own).learning_rate("text", "came-pytorch") == 5e-4
