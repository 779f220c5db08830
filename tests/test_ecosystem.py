"""What PyTorch's users do with models, done with ours: the same happens as with the model on torch.nn."""

import copy
import pickle
import warnings

import pytest
import torch
from ecosystem_models import CLASSES, KINDS, Computed, batches, state, train_shared, trained, twin
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import fastarch

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(params=KINDS)
def model(request) -> nn.Module:
    return KINDS[request.param]()


@pytest.fixture
def x() -> Tensor:
    return batches(1)[0][0]


def test_training_is_that_of_the_twin(model):
    close(trained(model), trained(expected := twin()))
    close(state(model), state(expected))


def test_compiled_whole_and_not_again_for_every_batch(model):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in range(2, 9):
        x = torch.randn(size, 1, 12, 12)
        close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2  # one for the first size, one for all others


def test_exported_and_loaded(model, x, tmp_path):
    model.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in (2, 7):
        x = torch.randn(size, 1, 12, 12)
        close(loaded(x), model(x))


def test_packaged_by_aot_inductor(model, x, tmp_path):
    model.eval()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        close(torch._inductor.aoti_load_package(package)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(model, dtype):
    def losses(model: nn.Module) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
        for x, label in batches(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = nn.functional.cross_entropy(model(x), label)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.item())
        return found

    close(losses(model), losses(twin()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(model, x, use_reentrant):
    x.requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()), allow_unused=True)
    model.zero_grad()
    checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()
    close((x.grad, *(p.grad for p in model.parameters())), want)


def test_function_transforms(model, x):
    model.eval()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        close({n: t[i] for n, t in per_sample.items()}, torch.func.grad(loss)(parameters, x[i]), rtol=1e-4, atol=1e-5)
    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}
    _, got = torch.func.jvp(lambda p: loss(p, x[0]), (parameters,), (tangents,))
    gradients = torch.func.grad(loss)(parameters, x[0])
    close(got, sum((gradients[n] * t).sum() for n, t in tangents.items()), rtol=1e-4, atol=1e-4)


def test_an_ensemble_by_stacked_parameters(x):
    models = [KINDS["written"]().eval() for _ in range(2)]
    with torch.no_grad():
        models[1].head.bias += 1
    stacked, buffers = torch.func.stack_module_state(models)
    one = copy.deepcopy(models[0]).to("meta")
    got = torch.func.vmap(lambda p, b: torch.func.functional_call(one, (p, b), (x,)))(stacked, buffers)
    close(got, torch.stack([m(x) for m in models]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_train_apart(model, x, copied):
    other = copied(model)
    assert torch.equal(other(x), model(x))
    before = state(model)
    losses = trained(other)
    close(state(model), before, rtol=0, atol=0)
    assert trained(model) == losses


def test_weights_alone_are_saved_and_loaded(model, x, tmp_path):
    trained(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for other in (twin(), *(make() for make in KINDS.values())):
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
        close(other.eval()(x), model.eval()(x))


def test_hooks_of_every_kind(model, x):
    calls = []
    model.norm.register_forward_pre_hook(lambda m, args: calls.append("before"))
    model.norm.register_forward_hook(lambda m, args, y: 2 * y)
    model.gru.register_full_backward_hook(lambda m, grads, outputs: calls.append("backward"))
    model.head.weight.register_hook(lambda g: calls.append("tensor"))
    expected = twin()
    expected.norm.register_forward_hook(lambda m, args, y: 2 * y)
    y = model(x)
    close(y, expected(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert calls == ["before", "tensor", "backward"]


def test_made_on_the_meta_device_and_filled(model, x):
    with torch.device("meta"):
        empty = copy.deepcopy(model).to("meta")
    assert empty(x.to("meta")).shape == (6, CLASSES)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    close(empty(x), model(x))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(model, method, threads):
    threads(2)
    items = Computed(model)
    want = torch.stack([items[i] for i in range(4)])  # kernels and their threads have run before the fork
    loader = DataLoader(items, batch_size=2, num_workers=1, multiprocessing_context=method, timeout=120)
    close(torch.cat(list(loader)), want)


def test_trained_by_a_process_that_shares_its_memory(model):
    expected = copy.deepcopy(model)
    trained(expected)
    process = torch.multiprocessing.get_context("spawn").Process(target=train_shared, args=(model.share_memory(),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    close(state(model), state(expected))


def test_fused_adam(model):
    expected = twin()
    ours, torchs = (torch.optim.Adam(m.parameters(), 1e-2, fused=True) for m in (model, expected))
    close(trained(model, ours), trained(expected, torchs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(model, x, dtype):
    expected = twin().to(dtype)
    y, want = (m.to(dtype)(x.to(dtype)) for m in (model, expected))
    bound = 1e-7 if dtype == torch.float64 else 0.05
    close(y, want, rtol=bound, atol=bound)
    for result in (y, want):
        result.square().sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (model, expected)]
    largest = max(g.abs().max().item() for g in gradients[1].values())
    close(*gradients, rtol=bound, atol=bound * largest)


def test_inference_mode_and_frozen_parts(model, x):
    with torch.inference_mode():
        y = model.eval()(x)
    close(y, model(x))
    model.gru.requires_grad_(False)
    model.norm.requires_grad_(False)
    model(x).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        n for n, _ in model.named_parameters() if n.startswith(("gru", "norm"))
    }


def test_traced_by_torch_fx(model, x):
    """Layers of ours are called whole, as torch.nn's are, and the graph learns as the model does."""
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert {"norm", "gru", "attention", "head"} <= called
    close(trained(graph), trained(model))
    close(graph.eval()(x), model.eval()(x))


def test_traced_by_torch_jit(model, x):
    traced = torch.jit.trace(model.eval(), (x,), check_trace=False)
    close(traced(x), model(x))


def test_weights_that_are_computed(model):
    expected = twin()
    for each in (model, expected):
        torch.manual_seed(0)  # of what is pruned at random
        parametrizations.weight_norm(each.gru, "weight_hh_l0")
        parametrizations.spectral_norm(each.head)
        prune.l1_unstructured(each.norm, "bias", amount=2)
        prune.random_unstructured(each.attention.linear1, "weight", amount=0.5)
    close(trained(model), trained(expected), rtol=1e-4, atol=1e-5)
    close(state(model), state(expected), rtol=1e-4, atol=1e-5)
    assert (model.attention.linear1.weight == 0).sum() == model.attention.linear1.weight.numel() // 2


def test_quantised_layers_are_left_alone(x):
    model = twin().eval()
    with warnings.catch_warnings():  # it will leave torch for torchao
        warnings.simplefilter("ignore")
        layers = dict.fromkeys(("gru", "head"), torch.ao.quantization.default_dynamic_qconfig)
        quantised = torch.ao.quantization.quantize_dynamic(model, layers)
    fused = fastarch.fuse(quantised)
    assert type(fused.gru) is type(quantised.gru)
    assert type(fused.head) is type(quantised.head)
    close(fused(x), quantised(x), rtol=1e-4, atol=1e-5)


def test_averaged_weights_and_clipped_gradients(model):
    expected, averages, norms = twin(), [], []
    for each in (model, expected):
        average = torch.optim.swa_utils.AveragedModel(each, use_buffers=True)
        trained(each)
        average.update_parameters(each)
        averages.append(state(average))
        norms.append(nn.utils.clip_grad_norm_(each.parameters(), 0.1))
    close(*averages)
    close(*norms)


def test_second_derivatives(model, x):
    def penalty(model: nn.Module) -> dict[str, Tensor]:
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):  # torch's others have none
            image = x.double().requires_grad_()
            (slope,) = torch.autograd.grad(model.double()(image).square().sum(), image, create_graph=True)
            slope.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    close(penalty(model), penalty(twin()))
