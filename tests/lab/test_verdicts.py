"""Runs as files, and what follows from them: found by what was trained, never mixed, judged when all are there."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from deepseek_jax.cli.main import main
from deepseek_jax.lab.asked import asked, check_corpus, check_gate, rule, tasks
from deepseek_jax.lab.figure import draw
from deepseek_jax.lab.records import (
    LABELS,
    MEASURES,
    OF_DRAFTS,
    OF_EXPERTS,
    OF_PASSKEYS,
    OF_TRAINING,
    Runs,
    spec,
    text,
)
from deepseek_jax.lab.rules import MECHANISM, OPEN, OPPOSITE, REPRODUCED
from deepseek_jax.lab.study import TUNING_SEED, Study, load
from deepseek_jax.lab.verdicts import best, judge, ledger, spread, table

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDY = load(EXPERIMENTS, "v3_balance")
# What 2408.15664 found, in the order of its balance: MaxVio of held-out text.
BALANCE = {"none": 2.5, "aux-1e-3": 0.7, "aux-1e-2": 0.2, "sign-3e-3": 0.1, "sign-1e-2": 0.15}


def record(variant: str, seed: int, corpus: str = "aaaa", bits: float = 1.5) -> dict:
    """A run's file with made-up figures."""
    balance = BALANCE[variant] * (1 + 0.01 * seed)
    evaluation = {"bits_per_byte": bits + 0.01 * seed, "max_violation_global": [balance, balance], "tokens": 1}
    return {
        "spec": spec(STUDY.setup(variant), seed),
        "corpus": {"hash": corpus, "python": "3.11.0"},
        "seed": seed,
        "diverged": None,
        "curve": [[1, 2.0]],
        "evaluations": [evaluation] * 5,
        "max_violation_batch": [balance, balance],
        "dead_experts": [0, 1],
        "cpu_seconds": 60.0,
        "date": "2027-01-02",
    }


def at_cpu(study: Study, **fields) -> Study:
    """A study with other fields of its scale "cpu"."""
    return replace(study, scales={"cpu": replace(study.scales["cpu"], **fields)}, registered_with=())


def write(folder: Path, *records: dict) -> Runs:
    folder.mkdir(exist_ok=True)
    for one in records:
        (folder / f"{one['spec']}-{one['corpus']['hash']}.json").write_text(text(one))
    return Runs(folder)


@pytest.fixture
def whole(tmp_path) -> Runs:
    """The runs of every variant and seed."""
    return write(tmp_path / "runs", *(record(v, s) for v in STUDY.variants for s in STUDY.seeds))


def test_a_file_is_json_an_entry_a_line_and_holds_no_infinity():
    lines = text({"a": [1.5, 2], "b": None}).splitlines()
    assert lines == ["{", '"a": [1.5, 2],', '"b": null', "}"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        text({"a": math.inf})


def test_runs_are_found_by_what_they_trained(whole):
    found = whole.of(STUDY)
    assert len(found) == 25
    assert found["none", 3]["evaluations"][0]["max_violation_global"] == pytest.approx([2.575, 2.575])
    assert whole.path(STUDY.setup("none"), 3, "aaaa").is_file()
    # The calibration's base is this study's variant of the sign rule: one run serves both.
    calibration = load(EXPERIMENTS, "calibration")
    assert set(whole.of(calibration)) == {("base", seed) for seed in range(5)}


def test_corpora_are_not_mixed(tmp_path):
    runs = write(tmp_path / "runs", record("none", 0), record("sign-3e-3", 0, corpus="bbbb"))
    with pytest.raises(ValueError, match="of 2 corpora, aaaa, bbbb, which must not be compared"):
        runs.of(STUDY)
    (tmp_path / "runs" / runs.path(STUDY.setup("sign-3e-3"), 0, "bbbb").name).unlink()
    check_corpus(STUDY, Runs(runs.folder), {"hash": "aaaa", "python": "3.11.0"})
    with pytest.raises(
        ValueError, match=r"made on the corpus aaaa of Python 3.11.0, and the text here, of Python 3.12"
    ):
        check_corpus(STUDY, Runs(runs.folder), {"hash": "bbbb", "python": "3.12.0"})


def test_only_what_is_missing_is_made_seed_by_seed(tmp_path):
    runs = write(tmp_path / "runs", record("none", 0), record("sign-3e-3", 1))
    wanted = asked(STUDY, ("none", "sign-3e-3"), 2)
    found = tasks(wanted, runs, "aaaa", {"study": "v3_balance"}, "v3_balance")
    assert [(task.label, task.about["asked"]["variant"]) for task in found] == [
        ("v3_balance, sign-3e-3, seed 0", "sign-3e-3"),
        ("v3_balance, none, seed 1", "none"),
    ]
    assert len(tasks(wanted, runs, "bbbb", {}, "x")) == 4
    assert len(asked(STUDY, (), None)) == 25
    assert asked(STUDY, (), 0) == []
    with pytest.raises(ValueError, match="registered with 5 seeds, and --seeds 6"):
        asked(STUDY, (), 6)
    with pytest.raises(ValueError, match="no variant 'nun'; choose one of none, aux"):
        asked(STUDY, ("nun",), None)


def test_a_study_is_judged_when_its_runs_are_there(whole):
    words = {one.claim.id: one.verdict.word for one in judge(STUDY, whole.of(STUDY))}
    assert words == {"C3": REPRODUCED, "C4": REPRODUCED, "C5": REPRODUCED, "C6": REPRODUCED, "C7": MECHANISM}
    whole.path(STUDY.setup("aux-1e-2"), 4, "aaaa").unlink()
    judged = {one.claim.id: one for one in judge(STUDY, Runs(whole.folder).of(STUDY))}
    assert (judged["C3"].verdict.word, judged["C5"].verdict.word) == (REPRODUCED, OPEN)
    assert judged["C5"].verdict.why == "24 of 25 runs are there"
    # Where a claim is of the mechanism only, what was seen is told with what could have been seen.
    assert "detectable" in judge(STUDY, whole.of(STUDY))[-1].verdict.why


def test_the_paper_may_be_wrong(tmp_path):
    worst = {"sign-3e-3": "none", "none": "sign-3e-3"}
    records = [record(worst.get(v, v), s) | {"spec": spec(STUDY.setup(v), s)} for v in STUDY.variants for s in range(5)]
    words = [one.verdict.word for one in judge(STUDY, write(tmp_path / "runs", *records).of(STUDY))]
    assert words == [OPPOSITE, OPPOSITE, OPPOSITE, OPPOSITE, MECHANISM]


def test_a_run_that_diverged_is_the_worst_of_all():
    gone = record("none", 0) | {"diverged": 17, "evaluations": [], "curve": [], "max_violation_batch": None}
    assert [OF_TRAINING[name](gone) for name in OF_TRAINING if name != "curve"] == [math.inf] * 4


def test_figures_of_experts_are_of_the_runs_that_have_them():
    bits = {"whole": 2.0, "routed": [[2.1, 2.2], [2.0, 2.05]], "shared": [2.8, 2.3], "replaced": 2.6}
    run = record("none", 0) | {"probes": {"knock_outs": bits | {"top": {"1/8": 2.1, "1/4": 2.5}}}}
    run["evaluations"] = [{"load_divergence": [0.0, 0.1]}, {"load_divergence": [0.2, 0.5]}]
    found = {name: measure(run) for name, measure in OF_EXPERTS.items()}
    # Of the layers' 0.8 / 0.2 and 0.3 / 0.05 the smaller one.
    wanted = {"load_divergence": 0.2, "shared_to_routed": 4.0, "replaced": 0.3, "top_eighth": 0.05}
    assert found == pytest.approx(wanted)
    gone = {"diverged": 17, "evaluations": [], "probes": {}}
    dense = {"evaluations": [{"load_divergence": None}]}
    for other in (record("none", 0) | gone, record("none", 0) | dense):
        assert all(math.isnan(measure(other)) for measure in OF_EXPERTS.values())
    assert spread([1.0, math.nan]) == "1"
    assert spread([math.nan]) == ""


def test_figures_of_drafts_are_of_the_worse_kind_and_of_one_beside_the_other():
    kinds = {"code": {"greedy": 0.6, "constant": 0.1}, "prose": {"greedy": 0.4, "constant": 0.2}}
    run = record("none", 0) | {"probes": {"drafts": kinds}}
    found = {name: measure(run) for name, measure in OF_DRAFTS.items()}
    assert found == pytest.approx({"draft_over_constant": 2.0, "draft_code_over_prose": 1.5})


def test_figures_of_passkeys_are_of_the_rows_that_they_name():
    found = {"as it is": {"short": 0.8, "long": 0.2}, "yarn": {"short": 0.7, "long": 0.5}}
    run = record("none", 0) | {"probes": {"passkeys": found}}
    measured = {name: measure(run) for name, measure in OF_PASSKEYS.items()}
    assert measured == pytest.approx({"passkey_long": 0.2, "passkey_missed": 0.2, "passkey_untrained": 2.5})
    extended = record("none", 0) | {"probes": {"passkeys": {"as it is": {"short": 0.8, "long": 0.0}}}}
    assert math.isnan(OF_PASSKEYS["passkey_untrained"](extended))
    # Without it none is found: one key is what they are compared with; nothing and nothing is no ratio.
    for share, ratio in ((0.004, 2.0), (0.0, math.nan)):
        found = {"as it is": {"short": 0.8, "long": 0.0}, "yarn": {"short": 0.7, "long": share}}
        none = record("none", 0) | {"probes": {"passkeys": found}}
        assert OF_PASSKEYS["passkey_untrained"](none) == pytest.approx(ratio, nan_ok=True)
    gone = record("none", 0) | {"probes": {}}
    assert [measure(gone) for measure in OF_PASSKEYS.values()][:2] == [0, 1]


@pytest.fixture
def drawn(monkeypatch) -> list[list]:
    """The axes of each picture that is made."""
    axes, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (axes.append(figure.axes), save(figure, *a, **k)))
    return axes


def test_curves_and_the_seed_of_tuning_are_drawn(tmp_path, drawn):
    study = load(EXPERIMENTS, "v4_muon")
    found = Runs(EXPERIMENTS / "runs").of(study)
    draw(study, found, judge(study, found), tmp_path / "figure.png")
    ((dots, curves),) = drawn
    assert [line.get_label() for line in curves.lines] == ["adamw-2e-3", "adamw-4e-3", "muon-8e-3"]
    tokens, losses = curves.lines[-1].get_data()
    assert (len(tokens), tokens[-1]) == (16, study.base.recipe.tokens)
    assert losses[-1] == pytest.approx(sum(found["muon-8e-3", seed]["curve"][-1][1] for seed in study.seeds) / 5)
    rings = [line.get_ydata()[0] for line in dots.lines if line.get_fillstyle() == "none"]
    assert rings == [MEASURES["bits_per_byte"](found[name, TUNING_SEED]) for name in study.variants]


def test_one_measure_over_another_is_of_the_seeds_that_have_both(tmp_path, drawn):
    """None of a variant without runs, and none of a run that diverged."""
    assert STUDY.against is not None
    first, second = list(STUDY.variants)[:2]
    gone = record(first, 1) | {"diverged": 17, "evaluations": [], "probes": {}}
    some = {(first, 0): record(first, 0), (first, 1): gone, (second, 0): record(second, 0)}
    for found in ({}, some):
        assert draw(STUDY, found, judge(STUDY, found), tmp_path / "figure.png").stat().st_size > 1000
    empty, panel = (next(a for a in axes if a.get_xlabel() == LABELS[STUDY.against[0]]) for axes in drawn)
    assert len(empty.lines) == 0
    # A dot for its one seed and a cross at the mean, which is the same.
    values = [tuple(MEASURES[measure](some[name, 0]) for measure in STUDY.against) for name in (first, second)]
    points = [list(zip(*line.get_data(), strict=True)) for line in panel.lines]
    assert points == [[values[0]], [values[0]], [values[1]], [values[1]]]


def test_tables_and_ledger_say_what_there_is(whole):
    rows = table(STUDY, whole.of(STUDY))
    assert rows[0][:3] == ["variant", "runs", "MaxVio, held-out text"]
    assert rows[1][:3] == ["none", "5", "2.55 (SD 0.04)"]
    lines = ledger([(STUDY, whole.of(STUDY))])
    assert [line[1] for line in lines] == ["C3", "C4", "C5", "C6", "C7"]
    assert lines[0][-1] == "10 of 10 runs, 10 CPU minutes, 2027-01-02 to 2027-01-02"


def test_the_hash_of_a_rule_is_of_all_that_a_verdict_follows_from():
    words = replace(STUDY, question="?", minutes=9)
    assert words.rule_hash == STUDY.rule_hash
    # Of another scale's base only where it was registered with that.
    alone, gpu = replace(STUDY, registered_with=()), STUDY.at("gpu")
    assert alone.rule_hash == at_cpu(STUDY).rule_hash
    others = [
        alone,
        gpu,
        replace(gpu, registered_with=("cpu",)),
        replace(STUDY, seeds=(0, 1, 2)),
        replace(STUDY, claims=STUDY.claims[1:]),
        replace(STUDY, claims=(replace(STUDY.claims[0], mechanism_only="?"), *STUDY.claims[1:])),
        replace(
            STUDY, claims=(replace(STUDY.claims[0], rule=replace(STUDY.claims[0].rule, factor=3.0)), *STUDY.claims[1:])
        ),
        at_cpu(STUDY, variants=STUDY.variants | {"more": {"recipe.bias_speed": 0.5}}),
    ]
    assert len({study.rule_hash for study in (STUDY, *others)}) == 9


TUNED = load(EXPERIMENTS, "v4_muon")
# The best of each side, by the bits per byte of the seed that tunes.
TUNING = {
    "adamw-2e-3": 1.72,
    "adamw-4e-3": 1.71,
    "adamw-8e-3": 1.8,
    "muon-2e-3": 1.69,
    "muon-4e-3": 1.7,
    "muon-8e-3": 1.71,
}


def tuned(variant: str, seed: int) -> dict:
    """A run's file: at a verdict's seed Muon is better by 0.05 and comes to AdamW's loss in half of the steps."""
    muon = variant.startswith("muon")
    bits = TUNING[variant] if seed == TUNING_SEED else 1.7 - 0.05 * muon + 0.001 * seed
    own = {"spec": spec(TUNED.setup(variant), seed), "curve": [[n, 3 - n * (1 + muon) / 10] for n in range(1, 5)]}
    return record("none", seed, bits=0) | own | {"evaluations": [{"bits_per_byte": bits}]}


def pairs(runs: Runs, *variants: str, seeds: int | None = None) -> list[tuple[str, int]]:
    return [(v, seed) for v, seed, _ in asked(TUNED, variants, seeds, runs.of(TUNED))]


def test_sides_are_tuned_on_a_seed_of_its_own_and_the_best_of_each_is_compared(tmp_path):
    runs = write(tmp_path / "runs", *(tuned(v, s) for v in ("adamw-2e-3", "muon-2e-3") for s in range(5)))
    assert pairs(runs) == [(v, TUNING_SEED) for v in TUNED.variants]
    assert pairs(runs, "muon") == [(v, TUNING_SEED) for v in TUNED.variants if v.startswith("muon")]
    assert pairs(runs, "muon-8e-3", seeds=1) == [("muon-8e-3", 0)]
    assert pairs(runs, seeds=0) == []
    # Nothing is judged before both sides are tuned, whatever runs there are.
    assert [(one.verdict.word, one.there, one.needed) for one in judge(TUNED, runs.of(TUNED))] == [(OPEN, 0, 16)] * 2
    runs = write(tmp_path / "runs", *(tuned(v, TUNING_SEED) for v in TUNED.variants))
    assert best(TUNED, runs.of(TUNED)) == {"adamw": "adamw-4e-3", "muon": "muon-2e-3"}
    assert pairs(runs)[6:] == [(v, s) for s in range(5) for v in ("adamw-4e-3", "muon-2e-3")]
    assert [(one.verdict.word, one.there) for one in judge(TUNED, runs.of(TUNED))] == [(OPEN, 11)] * 2
    runs = write(tmp_path / "runs", *(tuned("adamw-4e-3", s) for s in range(5)))
    steps, bits = judge(TUNED, runs.of(TUNED))
    assert (steps.verdict.word, bits.verdict.word, bits.there) == (REPRODUCED, REPRODUCED, 16)
    assert steps.verdict.why.startswith("muon is muon-2e-3; adamw is adamw-4e-3; muon needs 0.50 times the tokens")
    rows = table(TUNED, runs.of(TUNED))
    assert rows[0] == ["variant", "runs", "held-out bits per byte", "bits per byte, seed 100"]
    assert [row[-1] for row in rows[1:4]] == ["1.72", "1.71", "1.8"]
    assert ledger([(TUNED, runs.of(TUNED))])[0][-1] == "16 of 16 runs, 16 CPU minutes, 2027-01-02 to 2027-01-02"


def test_the_command_goes_on_with_what_was_tuned(tmp_path, capsys, monkeypatch):
    made = []

    def make(title, wanted, runs, about, **more):
        new = [(v, s) for v, s, setup in wanted if not runs.path(setup, s, "aaaa").exists()]
        write(runs.folder, *(tuned(v, s) for v, s in new))
        made.append(len(new))
        return "aaaa"

    monkeypatch.setattr("deepseek_jax.cli.running.make", make)
    arguments = ["experiment", "v4_muon", "--folder", str(EXPERIMENTS), "--runs", str(tmp_path / "runs")]
    assert main(arguments) == 0
    assert made == [6, 10]
    assert "muon needs 0.50 times" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (tmp_path / "runs" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_tuned_is_tuned_alike():
    with pytest.raises(ValueError, match="must tune each side with as many variants as the others"):
        at_cpu(TUNED, tuned=TUNED.tuned | {"muon": ("muon-2e-3",)})
    with pytest.raises(ValueError, match="on a seed, 100, that no verdict has"):
        replace(TUNED, seeds=(0, TUNING_SEED))
    with pytest.raises(ValueError, match="tunes nun: no such variant"):
        at_cpu(replace(TUNED, claims=()), tuned={"adamw": ("nun",)})
    with pytest.raises(ValueError, match="claim C4 of v4_muon compares muon: no such variant"):
        at_cpu(TUNED, tuned={"adamw": TUNED.tuned["adamw"]})
    turned = {side: names[::-1] for side, names in TUNED.tuned.items()}
    assert at_cpu(TUNED, tuned=turned).rule_hash != at_cpu(TUNED).rule_hash == TUNED.rule_hash


def test_a_rule_that_is_not_committed_is_for_trials_only(tmp_path):
    (tmp_path / "v3_balance").mkdir()
    (tmp_path / "v3_balance" / "run.py").write_text("")
    assert rule(STUDY, tmp_path, trial=True) == {
        "study": "v3_balance",
        "rule": STUDY.rule_hash,
        "rule_commit": None,
    }
    with pytest.raises(ValueError, match="is not committed as it stands: commit it before its first run"):
        rule(STUDY, tmp_path, trial=False)


def test_the_command_judges_and_draws_what_is_there(whole, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--seeds", "0", "--folder", str(EXPERIMENTS), "--runs", str(whole.folder), "--json", str(out)]
    assert main(["experiment", "v3_balance", *arguments]) == 0
    shown = capsys.readouterr().out
    assert str(whole.folder / "figure.png") in shown.replace("\n", "")
    assert (whole.folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    assert found["claims"]["C4"]["verdict"] == REPRODUCED
    assert found["variants"][0]["MaxVio, held-out text"] == "2.55 (SD 0.04)"
    assert not list(whole.folder.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "STEM is missing; there are calibration, v1_moe"),
        (["v3_balance", "--list"], "--list shows all experiments"),
        (["v3_balance", "--seeds", "7"], "registered with 5 seeds"),
        (["v3_balance", "--variants", "nun"], "no variant 'nun'"),
        (["v3_mtp_targets"], "is run by itself"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    # Whatever is not refused would train for minutes.
    monkeypatch.setattr("deepseek_jax.cli.running.make", None)
    assert main(["experiment", *arguments, "--folder", str(EXPERIMENTS), "--runs", str(tmp_path / "runs")]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_scale_that_a_study_has_not_is_refused(tmp_path, capsys):
    source = (EXPERIMENTS / "v3_specialisation" / "run.py").read_text().replace(', "gpu": Scale(GPU, VARIANTS)', "")
    (tmp_path / "v3_specialisation").mkdir()
    (tmp_path / "v3_specialisation" / "run.py").write_text(source)
    assert main(["experiment", "v3_specialisation", "--scale", "gpu", "--folder", str(tmp_path)]) == 1
    assert "v3_specialisation has no scale 'gpu'; choose one of cpu." in capsys.readouterr().err


def test_a_larger_scale_comes_after_the_verdicts_of_cpu(whole, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr("deepseek_jax.cli.running.make", lambda title, wanted, *_, **__: made.append(wanted))
    (tmp_path / "v3_balance").mkdir()
    (tmp_path / "v3_balance" / "run.py").write_text((EXPERIMENTS / "v3_balance" / "run.py").read_text())
    command = ["experiment", "v3_balance", "--scale", "gpu", "--folder", str(tmp_path), "--runs"]
    # The runs of the folder of experiments count, and those of a trial, each by themselves.
    for place in (whole.folder, tmp_path / "trial"):
        assert main([*command, str(place)]) == 0
    gone = whole.path(STUDY.setup("aux-1e-2"), 4, "aaaa")
    moved = tmp_path / "trial" / gone.name
    moved.parent.mkdir(exist_ok=True)
    gone.rename(moved)
    capsys.readouterr()
    assert main([*command, str(tmp_path / "trial")]) == 1
    # C3 and C4 have the runs that they need.
    message = "and without one there are C5, C6, C7: make their runs first, deepseek-jax experiment v3_balance."
    assert message in capsys.readouterr().err
    assert main([*command, str(tmp_path / "trial"), "--seeds", "0"]) == 0
    assert [len(wanted) for wanted in made] == [25, 25]
    assert made[0][3][:2] == ("sign-3e-3", 0)
    assert made[0][3][2] == STUDY.at("gpu").setup("sign-3e-3")
    check_gate(STUDY, Runs(tmp_path / "none"))


def test_the_list_is_the_ledger(capsys, tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--folder", str(EXPERIMENTS), "--runs", str(tmp_path / "none"), "--json", str(out)]
    assert main(["experiment", "--list", *arguments]) == 0
    assert "calibration" in capsys.readouterr().out
    verdicts = {(row["experiment"], row["claim"]): row["verdict"] for row in json.loads(out.read_text())["ledger"]}
    assert verdicts["`v3_balance`", "C7"] == "**mechanism only**: 0 of 25 runs are there"
