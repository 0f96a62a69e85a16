"""R1's stages one after another at toy size: ended twice on the way, and none of them made twice."""

import os
import signal

import pytest
from rl.tagged import tagged

from deepseek_jax.cli import stages
from deepseek_jax.cli.main import main
from deepseek_jax.small_files import read_json

STAGES = ["r1-zero", "cold-start-chats", "cold-start", "grpo", "sampled", "sft", "rl"]


class Ended:
    """In place of the live view: presses Ctrl-C after a step of one stage."""

    def __init__(self, total, title, console=None):
        self.title = title

    def record(self, record: dict) -> None:
        if self.title == "tags, grpo" and record["kind"] == "step" and record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def say(self, line: str) -> None: ...

    def expect(self, tokens: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tagged(tmp_path_factory.mktemp("base"))


@pytest.mark.slow
def test_a_pipeline_goes_on_wherever_it_was_ended(base, tmp_path, monkeypatch, capsys):
    out, told = tmp_path / "r1", tmp_path / "told.json"
    shape = "--steps 3 --prompts 4 --group 8 --max-new-tokens 6 --lr 2e-3 --held-out 8 --attempts 4 --evaluate-every 3"
    own = "--stages.zero text --stages.cold-start 1000 --stages.rollouts 8 --stages.sft-lr 3e-3 --keep 2"
    form = "--task tags,documents=1280,ordered=100 --variant deepseek-math --grpo.beta 0"
    command = ["rl", str(out), "--pipeline", "--from", str(base), *shape.split(), *own.split(), *form.split()]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "LiveView", Ended)
        assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert list(read_json(out / "run.json")["stages"]) == STAGES[:3]
    made = {name: (out / name / "metrics.jsonl").read_bytes() for name in ("r1-zero", "cold-start")}
    # A kill in rejection sampling would leave this.
    (out / "sampled" / "tokenizer").mkdir(parents=True)
    assert main([*command, "--json", str(told)]) == 0
    said = capsys.readouterr().out
    assert all(f" {name} " in said for name in ("base", "r1-zero", "cold-start", "grpo", "sft", "rl"))
    assert "rejection sampling: " in said
    found = read_json(told)["stages"]
    assert list(found) == STAGES
    # The base writes the tags in any order, what learned from the solutions in theirs.
    assert found["r1-zero"]["before"]["format"] < 0.4
    assert min(found["grpo"]["before"]["format"], found["rl"]["after"]["format"]) > 0.8
    assert 0 < found["sampled"]["solved"] <= found["sampled"]["kept"] <= 2 * found["sampled"]["solved"]
    assert "resumed" in (out / "grpo" / "train.log").read_text()
    assert (out / "rl" / "checkpoint" / "model.safetensors").is_file()
    # Once more there is nothing left to do, and of other settings it is another pipeline.
    assert main(command) == 0
    assert made == {name: (out / name / "metrics.jsonl").read_bytes() for name in made}
    assert main([*command, "--stages.sft-epochs", "1"]) == 1
    assert "begun with stages.sft_epochs = 5.0, not 1.0" in capsys.readouterr().err
