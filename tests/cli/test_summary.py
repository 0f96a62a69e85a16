"""The summary prints the exact figures, fits 80 columns and refuses what it does not know."""

import json

import pytest

from deepseek_jax.cli.main import main
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.version import __version__


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_v3_in_full(capsys):
    assert main(["summary", "deepseek-v3"]) == 0
    text = capsys.readouterr().out
    for figure in (
        "671,026,404,352",
        "14,848",
        "36,625,603,584",
        "37,552,282,624",
        "61 x 187,107,328",
        "58 x 256 x 44,040,192",
        "11,507,307,520",
        "11,610,067,968",
        "13,463,426,048",
        "684,489,845,504",
        "70,272",
        "249,856",
        "3,997,696",
        "250.46",
        "$5,576,000",
        "2,788,000",
        "2412.19437 table 1",
        "54.2 days",
        "39.1% of 989",
        "Checked against the model's own shapes",
    ):
        assert figure in text, figure
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_the_published_figures_do_not_move_with_the_context(capsys):
    assert main(["summary", "deepseek-v3", "--context", "131072"]) == 0
    text = capsys.readouterr().out
    assert "250.46 GFLOPs" in text
    assert "39.1% of 989" in text
    assert "8,784.0 MiB" in text


@pytest.mark.parametrize("name", ["moonlight-16b", "kimi-k2", "tiny-v3"])
def test_other_models_have_no_training_cost(name, capsys):
    assert main(["summary", name]) == 0
    text = capsys.readouterr().out
    assert "$" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_json(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert main(["summary", "deepseek-v3", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["deepseek_jax"] == __version__
    assert record["config"]["attention"]["kv_rank"] == 512
    assert record["counts"]["total"] == 671_026_404_352
    assert record["cost"]["dollars"] == 5_576_000
    assert main(["summary", "tiny-v3", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["cost"] is None


def test_a_checkpoint_folder_and_its_config_file(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(zoo("tiny-v3"))))
    assert main(["summary", str(tmp_path)]) == 0
    folder = capsys.readouterr().out
    assert main(["summary", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == folder
    cfg = zoo("tiny-v3")
    assert folder.startswith(f"{tmp_path.name}: {cfg.n_layers} layers of width {cfg.dim}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is an empty folder; give a folder with config.json"),
        ("{", "config.json is not valid JSON"),
        ("[" * 100_000, "config.json is not valid JSON"),
        ('{"model_type": "gpt2"}', "'gpt2'"),
    ],
)
def test_a_bad_folder_is_one_line(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["summary", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_an_unknown_model_lists_the_names(capsys):
    assert main(["summary", "deepseek-v9"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for name in zoo():
        assert name in error


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, capsys):
    assert main(["summary", "tiny-v3", "--json", str(tmp_path / "none" / "a.json")]) == 1
    error = capsys.readouterr().err
    assert f"--json {tmp_path / 'none' / 'a.json'}: there is no folder {tmp_path / 'none'}." in error
    assert error.count("\n") == 1


def test_a_misspelt_field_is_one_note(tmp_path, capsys):
    data = config_to_json(zoo("tiny-v3")) | {"num_expert_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert main(["summary", str(tmp_path)]) == 0
    note = "note: config.json: nothing here reads num_expert_per_tok (did you mean num_experts_per_tok?); ignored.\n"
    assert capsys.readouterr().err == note
