"""The examples run, and show what they claim."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
pytest.importorskip("matplotlib")
pytest.importorskip("num2words")
pytest.importorskip("sklearn")
pytest.importorskip("statsmodels")


def load(name: str) -> ModuleType:
    """An example as a module, to look at what it computes."""
    path = next(p for p in EXAMPLES if p.stem == name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_and_draws(path, tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(path), "--quick", "--output", str(picture)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture.name) in ran.stdout.replace("\n", "")


def test_skip_connections_keep_the_gradient():
    example = load("vanishing_gradient")
    images, labels = example.load_digits()
    kept = {}
    for activation in ("sigmoid", "ReLU"):
        for skip in (False, True):
            network = example.DeepNetwork(15, activation, skip)
            next(example.train(network, images, labels, steps=1))
            norms = network.gradient_norms()
            assert len(norms) == 15
            kept[activation, skip] = norms[0] / norms[-1]
    assert kept["sigmoid", False] < 1e-8
    assert kept["ReLU", False] < 1e-3
    assert kept["sigmoid", False] < kept["ReLU", False]
    assert min(kept["sigmoid", True], kept["ReLU", True]) > 0.01


def test_gates_keep_the_gradient_where_an_elman_network_loses_it(threads):
    threads(1)  # too little for two
    example = load("long_memory")
    kept = {}
    for kind in example.KINDS:
        torch.manual_seed(0)
        norms = example.Memory(kind, 60).gradient_norms(*example.draw(60))
        assert len(norms) == 60
        kept[kind] = norms[0] / norms[-1]
    assert kept["Elman"] < 1e-10
    assert min(kept["GRU"], kept["LSTM"]) > 1e-3


def test_the_gradient_by_the_state_is_that_of_the_whole_sequence():
    """By the first state, which a layer takes: what the walk finds for a sequence that is one step longer."""
    example = load("long_memory")
    network = example.Memory("GRU", 20)
    x, labels = example.draw(20)
    h0 = network.rnn(x[:1])[1].detach().double().requires_grad_()
    exact = example.copy.deepcopy(network).double()
    logits = exact.fc(exact.rnn(x[1:].double(), h0)[0][-1])
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), h0)
    assert network.gradient_norms(x, labels)[0] == pytest.approx(grad.norm().item(), rel=1e-5)


def test_dates_are_written_in_many_ways_and_held_out():
    example = load("dates")
    known, held_out = example.split()
    assert len({*known} | {*held_out}) == len(known) + len(held_out) == 73_049
    assert len({example.human(held_out[0], form) for form in range(len(example.FORMATS))}) >= 15
    texts, dates = example.draw(held_out, 500, example.random.Random(0))
    batch = example.encode(texts, dates)
    for text, date, source, length, target in zip(texts, dates, *batch):
        assert "".join(example.READ[i] for i in source[:length]) == text
        assert target[0] == example.BEGIN
        assert example.decode(target[1:]) == date.isoformat()


def test_numbers_are_read_and_written_in_words_and_held_out():
    example = load("french_numbers")
    known, held_out = example.split(1000)
    assert not {*known} & {*held_out}
    assert len({*known}) == len(known) == example.KNOWN + 100
    assert len({*held_out}) == len(held_out) == 1000
    assert {len(str(n)) for n in held_out} == {3, 4, 5, 6}
    assert {*range(100)} < {*known}
    numbers = [0, 71, 97, *held_out, 777_777, 999_999]
    batch = example.encode(numbers)
    assert batch.target.shape[1] == 1 + example.LENGTH
    for number, source, length, target in zip(numbers, *batch):
        french = example.text([example.READ[i] for i in source[:length]])
        assert french == example.num2words(number, lang="fr")
        assert target[0] == example.BEGIN
        assert example.text(example.decode(target[1:])) == example.num2words(number, lang="en")
    assert french == "neuf cent quatre-vingt-dix-neuf mille neuf cent quatre-vingt-dix-neuf"


def test_a_transformer_learns_numbers(threads):
    """The first twenty by heart."""
    threads(1)  # too little for two
    example = load("french_numbers")
    torch.manual_seed(0)
    network = example.build()
    losses = [*example.train(network, [*range(20)], 60)]
    assert losses[-1] < 0.1 * losses[0]
    results = example.test(network.eval(), [*range(20)])
    assert sum(written == right for _, written, right in results) >= 18


def test_linear_models_forecast_sunspots():
    example = load("sunspots")
    years, numbers = example.load()
    assert (years[0], years[-1]) == (1700, 2008)
    split = int((years < example.SPLIT).sum())
    errors = [example.error(f, numbers[split:]) for f in (numbers[:-1], example.autoregression(numbers, split))]
    assert errors == pytest.approx([31.8, 18.2], abs=0.1)


def test_a_gru_learns_sunspots_in_chunks(threads):
    threads(1)  # too little for two
    example = load("sunspots")
    _, numbers = example.load()
    x = (numbers.sqrt() - 6) / 3
    losses = [*example.train(example.Forecaster(), x, epochs=30)]
    assert losses[-1] < 0.5 * losses[0]
