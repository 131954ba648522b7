from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nernlit.cli.configs import config_parts, expand_bases
from nernlit.cli.main import run
from nernlit.data import DigitsDataModule, NoImages
from nernlit.errors import CheckpointError, DataError, UsageError
from nernlit.kernels import AllKernels, Uniform, derive_seed
from nernlit.losses import reconstruction_mse, reconstruction_rmse
from nernlit.originals import Original, fisher_information
from nernlit.predictors import MLP, Codebooks, PredictorEnsemble, Quantize
from nernlit.representation import Representation
from nernlit.training import (
    BaselineJoint,
    DecoupledDistill,
    Progressive,
    Rate,
    ReconOnly,
    Reconstruction,
    ReconstructionPhase,
    Sensitivity,
    Step,
)
from nernlit.training.objectives import full_reconstruction_error
from nernlit.training.sensitivity import error_weights, normalized
from tests.fakes import QUICK, TinyCNN, digits_representation, quiet_trainer, tiny_representation

BATCH_NORM = Sensitivity("batchnorm", exponent=0.5)
ON_IMAGES: dict[str, object] = {"train_on": "images", "steps_per_epoch": None, "batch_size": 500}
FISHER = Sensitivity("fisher", num_images=16)


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def _digits(**options: object) -> DigitsDataModule:
    return DigitsDataModule(**{"train_on": "none", "steps_per_epoch": 3, **options})


def _fit(module: ReconOnly | DecoupledDistill | Progressive | BaselineJoint, **options: object) -> None:
    quiet_trainer(max_epochs=1, num_sanity_val_steps=0).fit(module, datamodule=_digits(**options))


def _recon_only(sensitivity: Sensitivity, seed: int = 0) -> ReconOnly:
    torch.manual_seed(seed)
    return ReconOnly(digits_representation(), _adam, sampling=Uniform(64), sensitivity=sensitivity)


def _codebooks(**options: object) -> Representation:
    torch.manual_seed(0)
    predictor = Codebooks(1, 4, iterations=5, **options)  # type: ignore[arg-type]
    return Representation(Original("digits_resnet8", pretrained=True), predictor, order="none")


def _random_sensitivities(representation: Representation) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        key: torch.rand(weight.shape, generator=generator).square()
        for key, weight in representation.original_weights().items()
    }


def test_weights_have_mean_1_and_are_powers_of_the_sensitivities() -> None:
    representation = tiny_representation()
    sensitivities = _random_sensitivities(representation)
    table = normalized(representation, sensitivities, 0.5, None)
    mask = representation.learned.mask()
    assert mask is not None
    assert not table[~mask].any()
    assert float(table[mask].mean()) == pytest.approx(1, rel=1e-6)
    flat = representation.layout.vector(sensitivities).sqrt()
    assert torch.allclose(representation.layout.vector(representation.layout.weights(table)), flat / flat.mean())
    assert torch.equal(normalized(representation, sensitivities, 0, None), mask.float())


def test_a_cap_limits_the_weights_and_keeps_their_mean() -> None:
    representation = tiny_representation()
    sensitivities = _random_sensitivities(representation)
    values = representation.layout.vector(sensitivities)
    capped = (values / values.mean()).clamp(max=1.5)
    table = normalized(representation, sensitivities, 1, 1.5)
    found = representation.layout.vector(representation.layout.weights(table))
    assert torch.allclose(found, capped / capped.mean(), rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_sensitivities_without_a_sum_are_refused(value: float) -> None:
    representation = tiny_representation()
    sensitivities = {key: torch.full_like(w, value) for key, w in representation.original_weights().items()}
    with pytest.raises(DataError, match="the sensitivities of the original's weights are all 0, or not finite"):
        normalized(representation, sensitivities, 0.5, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "hessian"},
            "sensitivity.kind='hessian'; expected one of none, fisher, kronecker, activation",
        ),
        ({"exponent": -0.1}, "sensitivity.exponent=-0.1; expected at least 0"),
        ({"cap": 0.5}, "sensitivity.cap=0.5; expected at least 1"),
        ({"num_images": 0}, "sensitivity.num_images=0; expected at least 1"),
        ({"seed": -1}, "sensitivity.seed=-1; expected at least 0"),
        ({"kind": "batchnorm", "image_size": 0}, "sensitivity.image_size=0; expected at least 1"),
        ({"kind": "fisher", "image_size": 8}, "sensitivity.image_size=8 has no effect with kind fisher; leave it out"),
        ({"image_size": 8}, "sensitivity.image_size=8 has no effect with kind none; leave it out"),
        ({"exponent": 0.5}, "sensitivity.exponent=0.5 has no effect with kind none; leave it out"),
        ({"kind": "batchnorm", "seed": 1}, "sensitivity.seed=1 has no effect with kind batchnorm; leave it out"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sensitivity(**options)  # type: ignore[arg-type]


def _step(representation: Representation, **options: object) -> Step:
    target = representation.target
    sizes = representation.learned.per_kernel()
    return Step(representation, None, target, target.flatten(1).norm(dim=1), sizes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["mse", "rmse"])
def test_the_weighted_error_trains_and_the_explained_power_is_not_weighted(loss: str) -> None:
    representation = tiny_representation()
    table = normalized(representation, _random_sensitivities(representation), 1, None)
    layout = representation.layout
    errors = layout.vector(representation.weights()) - layout.vector(representation.original_weights())
    expected = (layout.vector(layout.weights(table)) * errors.square()).mean() / representation.scale.square()
    expected = expected.sqrt() if loss == "rmse" else expected
    step, plain = _step(representation, error_weights=table), _step(representation)
    found = Reconstruction(AllKernels(), loss)(step)["recon"]  # type: ignore[arg-type]
    assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.allclose(
        full_reconstruction_error(representation, representation.weights(), loss, table), expected, rtol=1e-5
    )  # type: ignore[arg-type]
    assert not torch.allclose(Reconstruction(AllKernels(), loss)(plain)["recon"], expected, rtol=1e-2)  # type: ignore[arg-type]
    assert float(step.metrics["explained_power"]) == pytest.approx(float(plain.metrics["explained_power"]), abs=1e-6)


def test_processes_share_the_weighted_error_of_several_predictors() -> None:
    representation = tiny_representation()
    ensemble = PredictorEnsemble(representation.predictor, 2)
    table = normalized(representation, _random_sensitivities(representation), 1, None)
    options = {"error_weights": table, "ensemble": ensemble, "seed": 5, "number": 2}
    alone = Reconstruction(Uniform(24))(_step(representation, **options))["recon"]
    shares = [
        Reconstruction(Uniform(8))(_step(representation, **options, rank=rank, world_size=3))["recon"]
        for rank in range(3)
    ]
    assert torch.allclose(torch.stack(shares).mean(), alone, rtol=1e-5)


def test_a_fit_uses_the_fisher_information_of_training_images() -> None:
    module, again = _recon_only(FISHER), _recon_only(FISHER, seed=1)
    other, reseeded = _recon_only(replace(FISHER, num_images=8)), _recon_only(replace(FISHER, seed=1))
    for fitted in (module, again, other, reseeded):
        _fit(fitted)
    data = _digits()
    data.setup("fit")
    (images,) = data.training_images(16, 0)
    original, layout = module.representation.original, module.representation.layout
    found = fisher_information(original, [layer.key for layer in layout.layers], [images], derive_seed(0, 1))
    assert module.error_weights.table is not None
    assert torch.equal(module.error_weights.table, normalized(module.representation, found, 0.35, None))
    assert again.error_weights.table is not None
    assert torch.equal(again.error_weights.table, module.error_weights.table)
    assert other.error_weights.table is not None
    assert not torch.equal(other.error_weights.table, module.error_weights.table)
    assert reseeded.error_weights.table is not None
    assert not torch.equal(reseeded.error_weights.table, module.error_weights.table)
    metrics = module.trainer.callback_metrics
    pair = layout.vector(module.representation.weights()), layout.vector(module.representation.original_weights())
    assert float(metrics["val/recon_rmse"]) == pytest.approx(float(reconstruction_rmse(*pair).detach()), rel=1e-5)


def test_exponent_0_is_none_to_the_bit() -> None:
    weighted, plain = _recon_only(Sensitivity("batchnorm", exponent=0)), _recon_only(Sensitivity())
    for module in (weighted, plain):
        _fit(module)
    assert plain.error_weights.table is None
    for one, two in zip(weighted.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)


def _nearly_frozen(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-9)


def test_codes_are_those_of_the_weighted_error() -> None:
    representation, expected = _codebooks(), _codebooks()
    plain = expected.kernels().detach()
    phase_1 = ReconstructionPhase(0, sensitivity=Sensitivity("fisher", exponent=1, num_images=16))
    module = DecoupledDistill(representation, optimizer=_nearly_frozen, reconstruction=phase_1)
    _fit(module, **ON_IMAGES)
    table = module.error_weights.table
    assert table is not None
    expected.fit_predictor(table)
    assert torch.allclose(representation.kernels(), expected.kernels(), atol=1e-6)
    errors = [float(reconstruction_mse(k.detach(), expected.target, table)) for k in (expected.kernels(), plain)]
    assert errors[0] < 0.9 * errors[1]


def test_a_second_fit_and_a_file_keep_their_codewords(tmp_path: Path) -> None:
    module = DecoupledDistill(_codebooks(), optimizer=_adam, reconstruction=ReconstructionPhase(sensitivity=BATCH_NORM))
    _fit(module, **ON_IMAGES)
    trained = module.representation.kernels().detach().clone()
    module.representation.save(tmp_path / "net.nern")
    before = module.error_weights.table
    module.stages = (replace(module.stages[0], optimizer=_nearly_frozen),)
    _fit(module, **ON_IMAGES)
    assert torch.allclose(module.representation.kernels(), trained, atol=1e-6)
    assert module.error_weights.table is before
    phase_1 = ReconstructionPhase(1, sensitivity=BATCH_NORM)
    other = DecoupledDistill(module.representation, optimizer=_nearly_frozen, reconstruction=phase_1)
    _fit(other, **ON_IMAGES)
    assert torch.allclose(other.representation.kernels(), trained, atol=1e-6)
    with pytest.raises(UsageError, match="and no codes are computed here"):
        DecoupledDistill(module.representation, optimizer=_adam, reconstruction=replace(phase_1, steps=0))

    start = {"init_from": str(tmp_path / "net.nern"), "reconstruction": phase_1}
    loaded = DecoupledDistill(_codebooks(), optimizer=_nearly_frozen, **start)  # type: ignore[arg-type]
    _fit(loaded, **ON_IMAGES)
    assert torch.allclose(loaded.representation.kernels(), trained, atol=1e-6)
    assert loaded.error_weights.table is not None


def test_progressive_and_a_rate_start_from_the_new_codes() -> None:
    expected = _codebooks()
    expected.fit_predictor(error_weights(expected, BATCH_NORM, []))
    module = Progressive(_codebooks(), optimizer=_adam, rounds=1, trials=2, sensitivity=BATCH_NORM)
    _fit(module)
    codes = expected.predictor.state_dict()["_extra_state"]
    for trial in (*module.trial_predictors.each, module.representation.predictor):
        assert torch.equal(trial.state_dict()["_extra_state"], codes)
    assert not torch.equal(module.trial_predictors.each[0].codewords, module.trial_predictors.each[1].codewords)

    torch.manual_seed(0)
    predictor = Codebooks(1, 4, iterations=5)
    options = {"order": "none", "quantize": Quantize(4.0)}
    quantized = Representation(Original("digits_resnet8", pretrained=True), predictor, **options)  # type: ignore[arg-type]
    rated = ReconOnly(quantized, _adam, rate=Rate(target_bytes=40_000), sensitivity=BATCH_NORM)
    before = rated.rate
    _fit(rated)
    assert rated.rate is not before
    assert torch.equal(predictor.codes, expected.predictor.codes)  # type: ignore[arg-type]


def test_baseline_joint_weighs_its_reconstruction_term() -> None:
    terms = []
    for option in (BATCH_NORM, Sensitivity()):
        representation = digits_representation()
        table = error_weights(representation, BATCH_NORM, [])
        module = BaselineJoint(representation, _adam, sampling=Uniform(64), sensitivity=option)
        start = reconstruction_mse(
            representation.kernels().detach(), representation.target, None if option.kind == "none" else table
        )
        trainer = quiet_trainer(max_steps=1, num_sanity_val_steps=0)
        trainer.fit(module, datamodule=_digits(train_on="images", steps_per_epoch=None))
        assert float(trainer.callback_metrics["train/recon"]) == pytest.approx(float(start.sqrt()), rel=1e-4)
        terms.append(float(start))
    assert terms[0] != pytest.approx(terms[1], rel=1e-3)


def test_phase_2_weighs_its_reconstruction_term() -> None:
    terms = []
    for option in (BATCH_NORM, Sensitivity()):
        representation = digits_representation()
        weights_NKK = error_weights(representation, BATCH_NORM, []) if option == BATCH_NORM else None
        start = reconstruction_mse(representation.kernels().detach(), representation.target, weights_NKK)
        phase_1 = ReconstructionPhase(sensitivity=option)
        module = DecoupledDistill(
            representation, optimizer=_adam, reconstruction=phase_1, recon_weight=2.0, precision="fp32"
        )
        module.has_phase_1 = True  # its reconstruction is that of a random predictor
        trainer = quiet_trainer(max_steps=1, num_sanity_val_steps=0)
        trainer.fit(module, datamodule=_digits(train_on="images", steps_per_epoch=None))
        terms.append(float(trainer.callback_metrics["train/recon"]))
        assert terms[-1] == pytest.approx(2 * float(start / representation.scale**2), rel=1e-4)
    assert terms[0] != pytest.approx(terms[1], rel=1e-3)


def test_images_that_are_not_there_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"sensitivity fisher needs training images, and there are none \(`data: null"):
        quiet_trainer(max_epochs=1).fit(_recon_only(FISHER), datamodule=NoImages(2))
    with pytest.raises(UsageError, match=r"and this fit is to use none \(--data\.train_on noise\); pass batchnorm"):
        _fit(_recon_only(FISHER), train_on="noise")
    steps: DataLoader[int] = DataLoader(range(2), batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"and `fit` was given no datamodule; pass an ImageDataModule as datamodule"):
        quiet_trainer(max_epochs=1).fit(_recon_only(FISHER), steps)
    any_network = Representation(Original.from_module(TinyCNN()), MLP(8, kernel_size=5, num_frequencies=4))
    with pytest.raises(
        UsageError, match=r"sensitivity fisher needs an image classifier, but 'TinyCNN' was given without"
    ):
        quiet_trainer(max_epochs=1).fit(ReconOnly(any_network, _adam, sensitivity=FISHER), datamodule=NoImages(2))
    with pytest.raises(UsageError, match="sensitivity batchnorm needs an image classifier, but 'TinyCNN' was given"):
        error_weights(any_network, BATCH_NORM, [])
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    unstated = Representation(Original.from_module(net, 2, [0.5], [0.5]), MLP(8, num_frequencies=4))
    with pytest.raises(UsageError, match=r"'Sequential' does not state the size of its images; pass sensitivity\.im"):
        error_weights(unstated, BATCH_NORM, [])
    sized = replace(BATCH_NORM, image_size=8)
    assert float(error_weights(unstated, sized, []).mean()) == pytest.approx(1)
    module = _recon_only(BATCH_NORM)
    quiet_trainer(max_epochs=1).fit(module, datamodule=NoImages(2))
    assert module.error_weights.table is not None


def test_an_option_without_effect_is_refused() -> None:
    representation = digits_representation()
    with pytest.raises(
        UsageError, match="sensitivity batchnorm has no effect: the error of weights is not in the loss"
    ):
        BaselineJoint(representation, _adam, recon_weight=0, sensitivity=BATCH_NORM)
    with pytest.raises(
        UsageError, match="sensitivity batchnorm has no effect: the error of weights is not in the loss"
    ):
        DecoupledDistill(representation, optimizer=_adam, reconstruction=ReconstructionPhase(sensitivity=BATCH_NORM))
    with pytest.raises(UsageError, match="sensitivity: null; expected its options"):
        ReconOnly(representation, _adam, sensitivity=None)  # type: ignore[arg-type]


def test_layers_without_batch_norm_are_refused_on_the_command_line() -> None:
    with pytest.raises(
        UsageError, match=r"sensitivity batchnorm: linear\.weight is not followed by BatchNorm; pass fisher"
    ):
        run(["fit", *QUICK, "--model.representation.layers=all", "--model.sensitivity.kind=batchnorm"])


def test_a_fit_of_yaml_has_its_weights_in_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "model: {init_args: {sensitivity: {kind: fisher, exponent: 0.5, cap: 20, num_images: 16}}}\n"
    )
    cli = run(["fit", *QUICK, "-c", str(tmp_path / "own.yaml")])
    path = next(Path().rglob("last.ckpt"))
    stored = torch.load(path, weights_only=True)["sensitivity"]
    assert stored["options"] == {
        "kind": "fisher",
        "exponent": 0.5,
        "cap": 20.0,
        "num_images": 16,
        "seed": 0,
        "image_size": None,
    }
    assert torch.equal(stored["error_weights"], cli.model.error_weights.table)
    loaded = ReconOnly.load_from_checkpoint(path)
    assert torch.equal(loaded.error_weights.table, cli.model.error_weights.table)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"--model\.sensitivity\.exponent is 1\.0, and the checkpoint has 0\.5"):
        run(["fit", *QUICK, "--trainer.max_epochs=3", "--model.sensitivity.exponent=1", "--ckpt_path=last"])
    module = ReconOnly(loaded.representation, _adam, sensitivity=BATCH_NORM)
    with pytest.raises(
        CheckpointError, match=r"the checkpoint's fit had sensitivity \{'kind': 'fisher', .* this one has"
    ):
        quiet_trainer(max_epochs=3).fit(module, datamodule=_digits(steps_per_epoch=5), ckpt_path=path)


@pytest.mark.parametrize("scheme", ["recon_only", "baseline", "decoupled", "progressive"])
def test_the_papers_schedule_has_no_sensitivity(scheme: str) -> None:
    parts = config_parts(expand_bases(["-c", scheme, "--schedule=paper"]))
    model = parts[-1].options()["model"]["init_args"]
    assert model.get("reconstruction", model)["sensitivity"] == asdict(Sensitivity())
