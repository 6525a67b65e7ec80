"""A user's mistakes on the command line and in configuration files: one line, with what would be right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from finetune_runs import TINY, config_fields

from lit_adapter.cli.command import run
from lit_adapter.cli.finetune import main as finetune_main
from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.cli.generate import main as generate_main
from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.files.write import write_text
from lit_adapter.training import finetune as training


def test_a_missing_default_base_is_named_with_its_download(
    tiny_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = (
        r"^checkpoints/smollm2-135m: no converted base there; python scripts/download\.py smollm2-135m "
        "fetches it$"
    )
    with pytest.raises(UserError, match=message):
        finetune_main(["--config", str(TINY), "--data.train", str(tiny_records)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--trainer.precision 16-true", "trainer.precision is 16-true; fp16 gradients underflow"),
        ("--trainer.precision 16-mixed", "trainer.precision is 16-mixed, which needs a GPU"),
        (
            "--trainer.base_precision fp8",
            "trainer.base_precision is fp8 with precision .* on a cpu; it needs",
        ),
        ("--trainer.devices x", "trainer.devices is 'x'; expected a number or auto"),
        ("--trainer.strategy fsdp", "trainer.strategy is 'fsdp'; expected one of auto, ddp, fsdp2"),
        ("--trainer.accelerator mps", "trainer.accelerator is 'mps'; expected one of auto, cpu, cuda, gpu"),
        ("--trainer.accelerator cpu:3", "trainer.accelerator is 'cpu:3'; expected one of auto, cpu, cuda"),
        ("--trainer.accelerator cuda:1", "trainer.accelerator is 'cuda:1'; expected one of auto, cpu, cuda"),
        ("--data.val_size 1.0", "data.val_size is 1.0; expected a whole number of records, or a fraction"),
        ("--trainer.val_every 0", "trainer.val_every is 0; expected 1 or more"),
        ("--optim.lr nan", "optim.lr is 'nan'; expected a number"),
        ("--optim.lr .nan", "optim.lr is nan; expected a finite number"),
        ("--optim.lr=-1", "optim.lr is -1"),
        ("--optim.lr fast", "optim.lr is 'fast'; expected a number or null"),
        ("--optim.lr 0.1 --optim.base_lr 0.1", "optim.lr and optim.base_lr are both given"),
        ("--optim.warmup 100", "optim.warmup is 100 steps, longer than the run of 15"),
        ("--optim.batch_size 8.5", "optim.batch_size is '8.5'; expected a whole number"),
        ("--optim.batch_size 64", "optim.batch_size is 64, but there are only 40 training records"),
        ("--optim.row_tokens 20", r"optim.row_tokens is 20, but the longest record takes \d+ tokens"),
        ("--optim.epochs 0.01", r"optim.epochs is 0.01: less than one step \(an epoch has 5 steps\)"),
        ("--optim.betas 0.9,0.95", "optim.betas is '0.9,0.95'; expected a list such as"),
        ("--optim.betas [2,3]", "optim.betas is "),
        ("--optim.lrr 3", "unknown option '--optim.lrr'; did you mean '--optim.lr'"),
        ("--optim.learning_rate 3", "unknown option '--optim.learning_rate'; did you mean '--optim.lr'"),
        ("--learning-rate 3", "unknown option '--learning-rate'; did you mean '--optim.lr'"),
        ("--lr 3", "unknown option '--lr'; did you mean '--optim.lr'"),
        ("--model x", "unknown option '--model'; did you mean '--base'"),
        ("--output_dir x", "unknown option '--output_dir'; did you mean '--out'"),
        ("--trainer.batch_size 3", "did you mean '--optim.batch_size'"),
        ("--optim.eps .nan", "optim.eps is nan; expected a finite number above 0"),
        ("--optim.eps 0", "optim.eps is 0.0; expected a finite number above 0"),
        ("--optim.lr 1e39", "optim.lr is 1e\\+39; expected a number from 1.2e-38 to 3.4e\\+38"),
        ("--optim.lr 1e-60", "optim.lr is 1e-60; expected a number from 1.2e-38 to"),
        ("--optim.eps 1e-60", "optim.eps is 1e-60; expected a number from 1.2e-38 to"),
        ("--optim.clip 1e-60", "optim.clip is 1e-60; expected a number from"),
        ("--optim.clip=-1", "optim.clip is -1.0; expected a finite number above 0"),
        ("--optim.weight_decay 1e39", "optim.weight_decay is 1e\\+39; expected a number from"),
        ("--adapter.prompt_init_std 1e39", "adapter.prompt_init_std is 1e\\+39; expected a number from"),
        ("--adapter.prompt_init_std 0", "adapter.prompt_init_std is 0.0; expected a finite number above 0"),
        (
            "--adapter.version v2 --optim.lr_scale_v2 1e39",
            "optim.lr_scale_v2 is 1e\\+39; expected a number from",
        ),
        (
            "--adapter.version v2 --optim.lr 1e20 --optim.lr_scale_v2 1e20",
            r"the learning rate of V2, lr \* lr_scale_v2, is 1e\+40; expected a number from",
        ),
        ("--optim.lr_scale_v2 0.5", "optim.lr_scale_v2 is 0.5; it needs adapter.version v2"),
        (
            "--adapter.norms false --optim.lr_scale_norms 0.5",
            "optim.lr_scale_norms is 0.5; it needs adapter.norms true$",
        ),
        (
            "--adapter.version v2 --adapter.norms true --optim.lr_scale_norms 0.5",
            "optim.lr_scale_norms is 0.5; it needs adapter.norms true with version v1; v2 has lr_scale_v2",
        ),
        ("--adapter.gate tokens", "adapter.gate is 'tokens'"),
        ("--adapter.prefix_query none", "adapter.prefix_query is 'none'"),
        ("--optim.epochs 1e308", "optim.epochs makes .* steps, more than 9,999,999"),
        ("--optim.max_steps 10000000", "optim.max_steps makes 10,000,000 steps, more than 9,999,999"),
        ("--trainer.devices 9999", r"trainer.devices is 9999, but this machine has \d+ "),
        ("--data.val=", "data.val is empty; name a file"),
        ("--out=", "out is ''; expected a folder on this machine"),
        ("--out https://x/y", "out is 'https://x/y'; expected a folder on this machine"),
        ("--out run\udcff", r"out is 'run\\udcff', which is not UTF-8; choose another name"),
        ("--base b\udcff", r"base is 'b\\udcff', which is not UTF-8; choose another name"),
        ("--init_from a\udcff", r"init_from is 'a\\udcff', which is not UTF-8; choose another name"),
        ("--data.train d\udcff.json", r"data.train is 'd\\udcff.json', which is not UTF-8; choose another"),
        ("--data.val d\udcff.json", r"data.val is 'd\\udcff.json', which is not UTF-8; choose another"),
        ("--data.template t\udcff", r"data.template is 't\\udcff', which is not UTF-8; choose another"),
        ("--optim.epochs 1e8", "optim.epochs makes 500,000,000 steps, more than 9,999,999; lower it"),
        ("--data.workers 9999", "data.workers is 9999; expected 64 or less"),
        (
            "--adapter.prompt_length 99999999999",
            "adapter.prompt_length is 99999999999; expected 65536 or less",
        ),
        (f"--seed {2**64}", f"seed is {2**64}; expected a whole number from 0"),
        ("--seed=-1", "seed is -1; expected 0 or more"),
        ("--adapter.layers 9", "adapter.layers is 9; the base has 4 layers"),
        ("--adapter.gate foo", "adapter.gate is 'foo'; expected one of tanh, identity, layer, channel"),
        ("--adapter.prompt_length 0", "adapter.prompt_length is 0; expected 1 or more"),
        ("--data.max_length 5000", "data.max_length is 5000, but the base's context is 1024"),
        ("--data.template hello", "template 'hello' is unknown"),
        ("--data.template=", "template '' is unknown; expected alpaca"),
        ("--data.template chat", "this base has no chat template"),
        ("--data.val nofile.json", "nofile.json: file not found"),
        ("--data.val_size 50", "val_size 50 of the 48 records"),
        ("--base=", "base is empty; name a converted base folder"),
        ("--adapter 5", "adapter is a group of fields; give them one by one"),
        (
            "--base nowhere",
            r"^nowhere: no converted base there; python scripts/download\.py ORG/NAME --out nowhere fetches "
            r"one from the Hugging Face Hub, scripts/convert\.py converts a model that you have$",
        ),
        ("--resume last", "no such run folder, nothing to resume"),
        ("--out /proc/x", "/proc/x.*cannot write"),
    ],
)
def test_a_wrong_option_is_named(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, options: str, message: str
) -> None:
    fixed = ["--config", TINY, "--base", tiny_base, "--data.train", tiny_records, "--out", tmp_path / "run"]
    with pytest.raises(UserError, match=message) as caught:
        finetune_main([*map(str, fixed), *options.split()])
    assert "\n" not in str(caught.value)
    left = list((tmp_path / "run").iterdir()) if (tmp_path / "run").exists() else []
    assert left == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", r":3: key 'optim.lr' is given twice; keep one"),
        (
            "adapter:\n  lora:\n    on: [mlp]\n",
            r":3: YAML reads the key on as a truth value; write 'on' in quot",
        ),
        ("optim:\n  batchsize: 1\n", r":2: unknown key 'optim.batchsize'; did you mean 'batch_size'\?"),
        ("optim:\n  learning_rate: 1\n", r":2: unknown key 'optim.learning_rate'; did you mean 'lr'\?"),
        ("lr: 1\n", r":1: unknown key 'lr'; did you mean 'optim.lr'\?"),
        ("seed: 1\nlearning_rate: 1\n", r":2: unknown key 'learning_rate'; did you mean 'optim.lr'\?"),
        ("devices: 2\n", r":1: unknown key 'devices'; did you mean 'trainer.devices'\?"),
        ("trainer:\n  epochs: 2\n", r":2: unknown key 'trainer.epochs'; did you mean 'optim.epochs'\?"),
        ("data: {instruction: q}\n", r"unknown key 'data.instruction'; did you mean 'data.columns.instru"),
        ("data: {seed: 1}\n", r":1: unknown key 'data.seed'; did you mean 'seed'\?"),
        ("data:\n  mask_prompt:\n", r":2: 'data.mask_prompt' has no value; give one, or leave the key out"),
        ("optim: {betas: [0.9, null]}\n", r":1: 'optim.betas' has no value"),
        ("base: ~\n", r":1: 'base' has no value"),
        (
            "optim:\n  batch_size: 010\n",
            r":2: 'optim.batch_size' is 010, which YAML reads as 8; write",
        ),
        ("optim:\n  max_steps: 1:30\n", r":2: 'optim.max_steps' is 1:30, which YAML reads as 90"),
        ("optim.lr: 0.1\n", r":1: key 'optim.lr' has a dot; write sections within sections"),
        (
            "data.columns.input: q\n",
            r":1: key 'data.columns.input' has a dot; write sections within sections, as in configs/quick",
        ),
        ('out: "a\\0b"\n', r":1: 'out' holds a null character"),
        ("adapter: 5\n", r":1: 'adapter' must hold keys such as prompt_length"),
        ("optim: {lr: 1\n", r":\d: not valid YAML"),
        ("\tbase: x\n", r":1: not valid YAML"),
        (
            "optim: !!python/object:os.system {lr: 1}\n",
            r":1: not valid YAML: .* the tag .*os.system",
        ),
        ("? [a]\n: 1\n", r":\d: not valid YAML: found unhashable key"),
        ("- base\n", "expected keys and values"),
        ("", "expected keys and values"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"config.yaml(:|:? ).*{message.lstrip(':')}|config.yaml{message}"):
        finetune_main(["--config", str(path)])


def test_a_missing_configuration_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml: no such configuration file"):
        finetune_main(["--config", "nowhere.yaml"])


def test_a_pipe_or_device_is_never_replaced_by_a_file(
    tiny_base: Path, tiny_records: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"  # stands for /dev/null, which a failing test would destroy
    os.mkfifo(pipe)
    options = ["--base", tiny_base, "--prompts", tiny_records, "--output", pipe, "--overwrite"]
    with pytest.raises(UserError, match="pipe: a pipe, socket or device"):
        generate_main([*map(str, options)])
    with pytest.raises(UserError, match="pipe: a pipe, socket or device"):
        write_text(pipe, "x")
    assert pipe.is_fifo()
    assert list(tmp_path.glob(".pipe*")) == []


def test_an_unfinished_answer_file_that_is_a_pipe_is_not_waited_for(
    tiny_base: Path, tiny_records: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / ".out.jsonl.partial")
    options = ["--base", tiny_base, "--prompts", tiny_records, "--output", tmp_path / "out.jsonl"]
    with pytest.raises(UserError, match=r"\.partial: not a regular file"):
        generate_main([*map(str, options)])


def test_a_link_is_followed_but_not_to_an_open_file(tmp_path: Path) -> None:
    """As /dev/stdout is one, which a rename would replace for the whole machine."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    (tmp_path / "result").write_text("old")
    (tmp_path / "link").symlink_to("result")
    with pytest.raises(UserError, match="stdout: a link to an open file or a device"):
        write_text(tmp_path / "stdout", "new")
    write_text(tmp_path / "link", "new")
    (tmp_path / "circle").symlink_to("circle")
    write_text(tmp_path / "circle", "new")
    assert (tmp_path / "circle").read_text() == "new"
    assert (tmp_path / "result").read_text() == "new"
    assert all((tmp_path / name).is_symlink() for name in ("stdout", "link"))


def test_a_name_that_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["finetune.py", "--config", "x" * 300])
    with pytest.raises(SystemExit) as ended:
        run(finetune_main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("x...: File name too long\n")


def test_what_print_config_prints_is_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_finetune(["--config", str(TINY), "--print_config"])
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse_finetune(["--config", str(path)]) == parse_finetune(["--config", str(TINY)])


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_finetune(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, _ in config_fields(Config):
        # A field that takes a list has an option of the same name with a plus beside it.
        option = f" --{name}+ " if f" --{name}+ " in said else f" --{name} "
        own = said.partition(option)[2].partition(" --")[0].partition("(type: ")[0]
        assert len(own.split()) > 2, f"{name} is not explained: {own}"  # the first stands for the value


def test_a_run_that_is_refused_leaves_no_folder(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "wrong.jsonl"
    data.write_text('{"question": "?", "answer": "!"}\n')
    fixed = ["--config", TINY, "--base", tiny_base, "--data.train", data, "--out", tmp_path / "run"]
    with pytest.raises(UserError, match="'instruction' is missing"):
        finetune_main([*map(str, fixed)])
    assert not (tmp_path / "run").exists()


def test_a_missing_data_file_is_found_before_anything_slow(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is read, and precisions are timed, only for data that is there."""
    monkeypatch.setattr(training, "read_base", lambda *unused, **options: pytest.fail("the base was read"))
    for words, message in (
        (["--data.train", "gone.json"], r"^gone\.json: file not found; check"),
        (["--data.train", TINY, "--data.val", "gone.csv"], r"^gone\.csv: file not found; check"),
        ([], r"^data\.train is not set; give a file of records"),
    ):
        with pytest.raises(UserError, match=message):
            finetune_main([*map(str, ["--base", tiny_base, "--out", tmp_path / "run", *words])])
    assert not (tmp_path / "run").exists()
