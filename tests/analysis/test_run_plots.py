"""A run's records as they come (growing, resumed, damaged), and the pictures of one, few and very many of them."""

import json

import numpy as np
import pytest

from deepseek_jax.analysis.run_panels import thinned
from deepseek_jax.analysis.run_plots import PICTURES, draw_run
from deepseek_jax.analysis.run_records import MOST_VECTORS, Run, read_run
from deepseek_jax.runs.metrics import JsonLines


def step(n: int, layers: int = 2, experts: int = 4, loss: float = 2.0) -> dict:
    rng = np.random.default_rng(n)
    load = rng.integers(1, 20, (layers, experts))
    return {
        "kind": "step",
        "minutes": n / 10,
        "step": n,
        "tokens": n * 1024,
        "loss": loss,
        "main": loss - 0.5,
        "mtp": loss + 0.5,
        "balance": {"sequence": 1.0},
        "rewards": {"accuracy": 0.25, "format": 0.75},
        "silent": 0.5,
        "clipped_low": 0.01,
        "mismatch": 0.001,
        "grad_norm": 0.5,
        "gradient_norms": {
            "embed": 0.1,
            **{f"layer.{i}": 0.2 + i for i in range(layers + 1)},
            "mtp.0": 0.3,
            "head": 0.4,
        },
        "max_violation": load.max(-1) / load.mean(-1) - 1,
        "routing_entropy": np.full(layers, 1.2),
        "bias_min": np.full(layers, -0.1),
        "bias_max": np.full(layers, 0.1),
        "load": load,
        "bias": rng.normal(size=(layers, experts)),
        "activation_norm": np.arange(1, layers + 2),
        "dropped": 0,
        "skipped": 0,
        "lr": 1e-3,
        "bias_speed": 1e-3,
        "mtp_weight": 0.3,
        "batch_rows": 4,
        "tokens_per_second": 1e4,
        "mfu": None,
        "data_wait": 0.001,
    }


def evaluation(n: int, layers: int = 2, bits: float = 1.5) -> dict:
    return {
        "kind": "evaluation",
        "minutes": n / 10,
        "step": n,
        "tokens": n * 1024,
        "bits_per_byte": bits,
        "ema_bits_per_byte": bits - 0.1,
        "trigram_bits_per_byte": 1.6,
        "domains": {"code": bits - 0.2, "prose": bits + 0.2},
        "draft_agreement": 0.5,
        "pass_at_1": 0.25,
        "pass_at_k": 0.5,
        "max_violation_global": np.full(layers, 0.5),
    }


def write(folder, records) -> Run:
    lines = JsonLines(folder / "metrics.jsonl")
    for record in records:
        lines.record(record)
    lines.close()
    return read_run(folder)


def texts(figure) -> list[str]:
    """Everything that is written on a figure's panels: titles, labels, legends."""
    found = [figure.get_suptitle()]
    for ax in figure.axes:
        found += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *(t.get_text() for t in ax.texts)]
        found += [t.get_text() for t in (ax.get_legend().get_texts() if ax.get_legend() else ())]
    return [text for text in found if text]


def test_values_are_read_as_they_were_written(tmp_path):
    run = write(tmp_path, [{"kind": "run", "jax": "1"}, step(1, loss=float("nan")), step(2), evaluation(2)])
    assert np.isnan(run.steps["loss"].values[0])
    assert run.steps["loss"].values[1] == 2.0
    assert run.steps["load"].array().shape == (2, 2, 4)
    assert run.steps["gradient_norms/layer.1"].array().tolist() == [1.2, 1.2]
    assert run.evaluations["domains/code"].array() == pytest.approx(1.3)
    assert run.steps["loss"].along("tokens").tolist() == [1024, 2048]
    assert run.steps["loss"].along("minutes").tolist() == [0.1, 0.2]
    assert "mfu" not in run.steps


def test_what_was_trained_last_counts(tmp_path):
    """Steps 3 to 5 were lost: the run went on from the checkpoint of step 2, and has come to step 4."""
    lost = [step(n, loss=9.0) for n in (1, 2, 3, 4, 5)] + [evaluation(5, bits=9.0)]
    resumed = {"kind": "event", "step": 2, "tokens": 2048, "minutes": 0.6, "event": "resumed", "message": "x"}
    run = write(tmp_path, [*lost, resumed, step(3), step(4)])
    assert run.steps["loss"].along("step").tolist() == [1, 2, 3, 4]
    assert run.steps["loss"].values == [9.0, 9.0, 2.0, 2.0]
    assert len(run.evaluations["bits_per_byte"]) == 0
    assert [name for _, name, _ in run.events] == ["resumed"]


def test_repeated_steps_without_an_event_count_once(tmp_path):
    run = write(tmp_path, [step(1, loss=9.0), step(2, loss=9.0), evaluation(2), step(2), evaluation(2, bits=1.0)])
    assert run.steps["loss"].values == [9.0, 2.0]
    assert run.evaluations["bits_per_byte"].values == [1.0]


def test_damaged_lines_are_named_and_the_last_one_may_be_half_written(tmp_path):
    whole = [json.dumps({"kind": "step", "step": n, "tokens": n, "loss": 1.0}) for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text(f'{whole[0]}\n{{"kind": "st\n7\n{whole[1]}\n{whole[0][:20]}')
    run = read_run(tmp_path)
    assert run.steps["loss"].along("step").tolist() == [1, 2]
    assert run.damaged == [2, 3]


@pytest.mark.parametrize(("make", "message"), [(False, "is not a folder"), (True, "has no metrics.jsonl")])
def test_what_is_no_run_is_said(tmp_path, make, message):
    folder = tmp_path / "run"
    if make:
        folder.mkdir()
    with pytest.raises(ValueError, match=message):
        read_run(folder)


def test_arrays_are_thinned_and_numbers_are_not(tmp_path):
    n = 5 * MOST_VECTORS
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for i in range(n):
            file.write(json.dumps({"kind": "step", "step": i, "tokens": i, "loss": i, "load": [[i, 1]]}) + "\n")
    run = read_run(tmp_path)
    assert len(run.steps["loss"]) == n
    kept = run.steps["load"].along("step")
    assert MOST_VECTORS <= len(kept) <= 2 * MOST_VECTORS
    assert set(np.diff(kept)) == {4.0}
    assert run.steps["load"].array()[:, 0, 0].tolist() == kept.tolist()


def test_a_thinned_line_keeps_its_spikes_and_ends():
    x = np.arange(100_000.0)
    y = np.sin(x / 5000)
    y[[123, 77_777]] = 50, -50
    y[500:700] = np.nan
    x, y = thinned(x, y)
    assert len(x) <= 4000
    assert (np.nanmax(y), np.nanmin(y)) == (50, -50)
    assert (x[0], x[-1]) == (0, 99_999)
    assert (np.diff(x) > 0).all()


def test_every_picture_says_what_it_shows(tmp_path):
    spike = {"kind": "event", "step": 30, "tokens": 30_720, "minutes": 3, "event": "spike", "message": "x"}
    run = write(tmp_path, [*(step(n) for n in range(1, 61)), evaluation(30), spike, evaluation(60)])
    said = {
        "loss": ["Training loss", "nats a token", "MTP", "next token", "bits a byte", "model", "code", "MTP drafts"],
        "rewards": ["Rewards by part", "accuracy", "format", "pass@1", "pass@k", "groups without signal", "share (%)"],
        "policy": ["clipped below", "Mismatch", "nats a token"],
        "schedule": ["Learning rate", "rows a step", "change a step", "Weight of the MTP loss"],
        "balance": ["MaxVio", "MoE layer 1", "global", "entropy (nats)", "even load: 1.39", "sequence"],
        "load": ["expert", "MoE layer 1 over time", "load, times the mean of the layer"],
        "bias": ["MoE layer 1", "dark where it ends lowest"],
        "norms": ["before clipping", "layer 2", "embed", "MTP 0", "head", "Residual stream", "root mean square"],
        "throughput": ["tokens a second", "ms a step"],
    }
    assert set(said) == set(PICTURES)
    for name, draw in PICTURES.items():
        figure = draw(run, "tokens")
        text = "\n".join(texts(figure))
        missing = [part for part in (*said[name], "tokens trained on") if part not in text]
        assert missing == [], name
        if name != "load":
            assert [t.get_text() for legend in figure.legends for t in legend.get_texts()] == ["spike"]
    # The CPU has no known peak.
    assert "MFU" not in "\n".join(texts(PICTURES["throughput"](run, "tokens")))


def test_large_models_have_a_choice_of_layers_and_a_colour_bar(tmp_path):
    run = write(tmp_path, [step(n, layers=58, experts=256) for n in (1, 2, 3)])
    assert "6 of 58 MoE layers" in PICTURES["bias"](run, "step").get_suptitle()
    titles = [ax.get_title() for ax in PICTURES["load"](run, "step").axes]
    assert [t for t in titles if "over time" in t] == [f"MoE layer {n} over time" for n in (0, 11, 23, 34, 46, 57)]
    balance = PICTURES["balance"](run, "step")
    assert "MoE layer" in texts(balance)
    assert not [text for text in texts(balance) if text.startswith("MoE layer ")]


def test_one_point_is_drawn_whole_or_not_at_all(tmp_path):
    run = write(tmp_path, [step(1, loss=float("inf"))])
    for axis in ("tokens", "step", "minutes"):
        assert all(draw(run, axis) is not None for draw in PICTURES.values())
    written = draw_run(run, tmp_path / "plots" / "new", "a run")
    assert [path.stem for path in written] == list(PICTURES)
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert b"deepseek_jax" in data
    assert sorted(path.name for path in (tmp_path / "plots" / "new").iterdir()) == sorted(p.name for p in written)


def test_only_what_is_on_record_is_drawn(tmp_path):
    run = write(tmp_path, [evaluation(5)])
    assert [name for name, draw in PICTURES.items() if draw(run, "tokens") is not None] == ["loss", "balance"]
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_run(Run(), tmp_path / "plots", "empty")
    assert not (tmp_path / "plots").exists()


def test_one_domain_is_not_drawn_over_the_whole(tmp_path):
    run = write(tmp_path, [evaluation(5) | {"domains": {"code": 1.5}}])
    assert "code" not in texts(PICTURES["loss"](run, "tokens"))
    assert "model" in texts(PICTURES["loss"](run, "tokens"))
