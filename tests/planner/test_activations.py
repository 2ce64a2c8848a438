"""The trace of activations, against real tensors."""

import pytest
import torch
import transformers

from benchmarks import planner as bench
from came8bit import planner
from came8bit.planner import activations

# The whole table is that of `make bench-planner`; these few show that it is still true.
LLAMA = {**bench.SMALL, "model_type": "llama"}
CASES = [
    bench.Case("llama", LLAMA, "fp32", 2, 128),
    bench.Case("llama", LLAMA, "bf16", 1, 256, True, True),
    bench.Case("llama tied", {**LLAMA, "tie_word_embeddings": True}, "bf16", 2, 64, True),
    bench.Case("gpt2", bench.SMALL_GPT2, "bf16", 2, 128, True, True),
    bench.Case("gemma2", {**bench.SMALL, "model_type": "gemma2"}, "bf16", 2, 64),
    bench.Case("sana", bench.SMALL_SANA, "bf16", 2, 64, True),
]
NARROW = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 90,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CLASSES = [
    ("LlamaModel", {**NARROW, "model_type": "llama"}),
    ("LlamaForSequenceClassification", {**NARROW, "model_type": "llama", "num_labels": 1}),
    ("GPT2ForTokenClassification", {**bench.SMALL_GPT2, "n_embd": 32}),
    ("LlamaForQuestionAnswering", {**NARROW, "model_type": "llama"}),
    ("BertForMaskedLM", {**NARROW, "model_type": "bert"}),
    ("T5ForConditionalGeneration", {"model_type": "t5", "d_model": 32, "d_ff": 48}),
    (
        "ViTForImageClassification",
        {"model_type": "vit", "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_trace_is_what_real_tensors_take(case):
    # Equal for most cases; a scalar that lives an operator longer is one rounding of an allocator.
    assert abs(bench.traced(case) - bench.counted(case)) <= bench.ROUNDING


@pytest.mark.parametrize(("name", "config"), CLASSES, ids=lambda value: str(value)[:30])
def test_any_class_is_traced(name, config):
    config = {**config, "architectures": [name]}
    case = bench.Case(name, config, "fp32", 2, 16)
    # A scalar more or less: both are below what an allocator rounds to.
    assert abs(bench.traced(case) - bench.counted(case)) < 512
    model = planner.from_config(config, "", "a file")
    assert name in model.source
    real = getattr(transformers, name)(transformers.CONFIG_MAPPING[config["model_type"]](**config))
    shapes = {n: tuple(p.shape) for n, p in real.named_parameters()}
    assert {p.name: p.shape for p in model.parameters} == shapes
    assert bool(model.notes) == name.endswith("Model")


def work(**changes):
    return planner.from_config({**LLAMA, **changes}, "", "").workload


def test_the_line_through_two_batches_is_exact():
    workload = work()
    for checkpointing in (False, True):
        settings = {"dtype": "bf16", "sequence": 32, "checkpointing": checkpointing}
        extended, traced = workload.at_batch(7, **settings), workload.trace(batch=7, **settings)
        for name in ("alive", "logits", "gradients", "complete"):
            difference = getattr(extended, name) - getattr(traced, name)
            # Each trace may be one rounding too high; five steps from 2 to 7 multiply a difference.
            assert abs(difference).max() <= 6 * bench.ROUNDING


def test_a_line_needs_the_same_operators():
    workload = work()
    two, other = (workload.trace("bf16", 2, 32, checkpointing=c) for c in (False, True))
    assert two.extended(other, 1) is None


def test_eager_attention_keeps_scores():
    workload = work()
    sequence = 256
    eager, fused = (workload.trace("fp32", 1, sequence, attention=a) for a in ("eager", "sdpa"))
    scores = 4 * bench.SMALL["num_attention_heads"] * sequence**2
    layers = bench.SMALL["num_hidden_layers"]
    assert eager.saved - fused.saved >= layers * scores


def test_dropout_keeps_a_byte_an_element_as_on_a_gpu():
    config = {**bench.SMALL_GPT2, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    plain, dropped = (
        planner.from_config({**config, "resid_pdrop": p}, "", "").workload.trace("bf16", 2, 64)
        for p in (0.0, 0.1)
    )
    masks = 2 * bench.SMALL_GPT2["n_layer"] * 2 * 64 * bench.SMALL_GPT2["n_embd"]
    assert dropped.saved - plain.saved == masks


def test_dropout_of_attention_is_counted_with_eager_attention_only():
    def saved(attention, **changes):
        workload = planner.from_config({**bench.SMALL_GPT2, **changes}, "", "").workload
        return workload.trace("bf16", 2, 64, attention=attention).saved

    assert saved("sdpa") == saved(None) == saved(None, attn_pdrop=0.0)
    assert saved("eager") > saved("eager", attn_pdrop=0.0) > saved("sdpa")


def test_logits_and_gradients_are_told_apart():
    trace = work().trace("bf16", 2, 64)
    table = 2 * 2000 * 256
    # What the softmax keeps, its gradient and that of the loss, each fp32.
    assert trace.logits.max() == 12 * 2 * 64 * 2000
    assert (trace.logits + trace.gradients <= trace.alive).all()
    model = planner.from_config(LLAMA, "", "")
    assert trace.complete[-1] + trace.gradients[-1] == 2 * model.numel
    assert trace.gradients.max() >= table
    assert sorted(name for _, name in trace.updates) == sorted(p.name for p in model.parameters)


def test_a_sequence_beyond_the_positions():
    workload = planner.from_config(bench.SMALL_GPT2, "", "").workload
    assert workload.longest == 512
    with pytest.raises(ValueError, match="got sequence 513, but the model has positions up to 512"):
        workload.trace("bf16", 1, 513)
    assert work().longest is None


def test_what_does_not_run_says_why():
    def build(dtype, checkpointing, attention):
        return torch.nn.Linear(2, 2)

    def loss(model, inputs):
        return model(inputs["x"]).sum().item()

    workload = planner.Workload(build, lambda *_: {"x": torch.ones(2)}, loss)
    with pytest.raises(planner.Untraceable, match="does not run on fake tensors"):
        workload.trace("fp32", 1, 1)


# --- the counter ----------------------------------------------------------------------------------


def test_the_counter_counts_what_is_alive():
    start = torch.ones(1000)
    with planner.StorageCounter([start]) as counter:
        kept = start + 1
        view = kept.view(10, 100)
        gone = start + 2
        assert counter.now == 8000
        assert counter.born(view) == 0
        del gone
        assert counter.now == 4000
        other = view * 2
    assert counter.peak == 8000
    assert counter.now == 8000
    del kept, view, other
    assert counter.now == 0


def test_a_gradient_counts_until_its_update_and_then_as_complete():
    model = torch.nn.Linear(100, 50, bias=False)
    inputs = torch.ones(20, 100)
    traced = activations.trace(model, lambda: model(inputs).sum(), [inputs])
    ((index, name),) = traced.updates
    assert name == "weight"
    assert traced.gradients[index] == 4 * 100 * 50
    assert traced.complete[-1] in (0, 4 * 100 * 50)  # the update may follow the last operator
    assert model.weight.grad is None
