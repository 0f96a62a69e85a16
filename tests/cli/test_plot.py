"""``deepseek-jax plot``: pictures of a run, one clear line for what is none."""

import json

import pytest

from deepseek_jax.analysis.compare import compare
from deepseek_jax.cli.main import main


@pytest.fixture
def run(tmp_path):
    """The folder of a run that is under way: its last line is half written."""
    folder = tmp_path / "tiny-v3-1"
    folder.mkdir()
    lines = [
        json.dumps({"kind": "step", "step": n, "tokens": 64 * n, "minutes": n, "loss": 5 / n, "lr": 1e-3})
        for n in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "step", "st')
    return folder


def test_it_draws_what_there_is(run, capsys):
    assert main(["plot", str(run)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [str(run / "plots" / name) for name in ("loss.png", "schedule.png")]
    assert all((run / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "schedule.png"))


def test_the_folder_and_the_axis_are_a_choice(run, tmp_path, capsys):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert main(["plot", str(run), "--out", str(tmp_path / "a" / "b"), "--by", "minutes"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "left out, not records (1): lines 6 of metrics.jsonl"
    assert (tmp_path / "a" / "b" / "loss.png").exists()
    assert not (run / "plots").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: run / "nowhere", "is not a folder; give the folder of a run."),
        (lambda run: run.parent, "is not the folder of a run: it has no metrics.jsonl."),
        (lambda run: (run / "metrics.jsonl").write_text("") or run, "no step and no evaluation is on record yet."),
    ],
)
def test_what_is_no_run_is_one_line(run, make, message, capsys):
    assert main(["plot", str(make(run))]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_an_out_that_is_a_file_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["plot", str(run), "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == (
        f"deepseek-jax plot: --out {tmp_path / 'file'}: this is a file; give a folder.\n"
    )


def recorded(folder, top_k: int, losses, peak: float = 1e-3):
    """The folder of a run with these losses, measured once at its second step."""
    folder.mkdir()
    about = {"model": {"name": "tiny", "moe": {"top_k": top_k}}, "settings": {"recipe": {"rate": {"peak": peak}}}}
    (folder / "run.json").write_text(json.dumps(about))
    records = [
        {"kind": "step", "step": n, "tokens": 64 * n, "minutes": n, "loss": loss, "max_violation": [0.5, 1.5]}
        for n, loss in enumerate(losses, 1)
    ]
    for n, bits in ((2, 1.5), (len(losses), 1.75)):
        records.append({"kind": "evaluation", "step": n, "tokens": 64 * n, "minutes": n, "bits_per_byte": bits})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_several_runs_share_a_picture_and_a_table(tmp_path, capsys):
    one, two = recorded(tmp_path / "a", 4, [5, 4, 3]), recorded(tmp_path / "b", 2, [5, 3, 2, 1], peak=0.002)
    out = tmp_path / "figures.json"
    assert main(["plot", str(one), str(two), "--json", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == str(tmp_path / "plots" / "compare.png")
    assert (tmp_path / "plots" / "compare.png").read_bytes().startswith(b"\x89PNG")
    cells = [line.split() for line in shown[:-1]]
    assert cells[:3] == [["a", "b"], ["top_k", "4", "2"], ["peak", "0.001", "0.002"]]
    assert ["loss", "4", "2.75"] in cells
    assert ["best", "bits", "per", "byte", "1.5", "1.5"] in cells
    # The name, which is equal, is no difference.
    first, second = json.loads(out.read_text())["runs"]
    assert (first["settings"], second["settings"]) == ({"top_k": 4, "peak": 0.001}, {"top_k": 2, "peak": 0.002})
    figures = second["figures"]
    assert (figures["steps"], figures["tokens"], figures["loss"]) == (4, 256, 2.75)
    assert (figures["bits_per_byte"], figures["best_bits_per_byte"], figures["best_at_step"]) == (1.75, 1.5, 2)
    assert (figures["max_violation"], figures["mtp_loss"]) == (1.0, None)


def test_runs_are_labelled_by_what_differs(tmp_path):
    (tmp_path / "x").mkdir()
    folders = [recorded(tmp_path / "a", 4, [5, 4]), recorded(tmp_path / "x" / "a", 4, [5, 4], peak=0.002)]
    labels = [one.label for one in compare(folders)]
    assert labels == [f"{folders[0]} (peak=0.001)", f"{folders[1]} (peak=0.002)"]
    assert [one.label for one in compare(folders[:1])] == ["a"]


def test_one_run_that_is_none_is_told_by_its_name(run, tmp_path, capsys):
    assert main(["plot", str(run), str(tmp_path)]) == 1
    assert f"{tmp_path} is not the folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()
