"""--adapter_name_or_path: a run goes on from an adapter that exists, and says so of no other."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dist.errors import UserError
from lora_dist.model.adapters import (
    add_adapters,
    check_first_adapter,
    check_first_classes,
    load_first_adapter,
    save_adapter,
    trainable_parameters,
)
from lora_dist.run.folder import RunFolder
from tests.helpers.parity import load_sharded
from tests.helpers.ranks import fork_ranks

FLAGS = (
    *("--model_name_or_path", "embedded", "--dataset_name", "embedded", "--quantization", "int8"),
    *("--report_to", "none", "--warmup_steps", "0", "--max_length", "32", "--lr_scheduler_type", "constant"),
    *("--dataset_test_split", "none", "--eval_fraction", "0.02"),
)


def run(folder: RunFolder, *flags: str) -> dict:
    ended = fork_ranks(*FLAGS, "--output_dir", str(folder.root), *flags, strategy="fsdp")
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    return json.loads(folder.state.read_text())["summary"]


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_and_still_measures_the_base(tmp_path):
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    trained = run(first, "--max_steps", "12", "--learning_rate", "0.002")
    further = run(second, "--max_steps", "1", "--learning_rate", "1e-9", "--adapter_name_or_path", str(first.adapter))
    assert trained["eval_loss"] < trained["eval_loss_base"] - 0.05
    assert further["eval_loss_base"] == pytest.approx(trained["eval_loss_base"], abs=1e-6)
    assert further["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-4)
    before, after = (load_file(f.adapter / "adapter_model.safetensors") for f in (first, second))
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)


@pytest.fixture
def saved(config, tmp_path):
    """(model with new adapters, folder of an adapter for it with other weights)."""
    from lora_dist.data.formats import load_tokenizer

    model = add_adapters(load_sharded("int8"), config)
    for param in trainable_parameters(model).values():
        param.data.add_(1.0)
    save_adapter(model, load_tokenizer("embedded"), tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_boundary_of_an_adapter_to_go_on_from(saved, config):
    model, folder = saved
    config = dataclasses.replace(config, adapter_name_or_path=str(folder))
    check_first_adapter(config)
    wanted = {name: param.detach().clone() for name, param in trainable_parameters(model).items()}
    for param in trainable_parameters(model).values():
        param.data.zero_()
    load_first_adapter(model, config)
    assert all(torch.equal(param, wanted[name]) for name, param in trainable_parameters(model).items())
    with pytest.raises(UserError, match="--lora_r 8: the adapter of --adapter_name_or_path .* has 16; give that"):
        check_first_adapter(dataclasses.replace(config, lora_r=8))
    with pytest.raises(UserError, match="adapter_config.json: .*No such file or directory"):
        check_first_adapter(dataclasses.replace(config, adapter_name_or_path=str(folder.parent)))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    for damaged, says in (
        ({name: tensors[name][:1].clone()}, "and the run needs"),
        ({name: tensors[name] * float("nan")}, "not finite"),
        ({"other.lora_A.weight": torch.ones(1)}, "has besides the run's own"),
    ):
        save_file(tensors | damaged, file)
        with pytest.raises(UserError, match=f"--adapter_name_or_path .*{says}"):
            load_first_adapter(model, config)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="--adapter_name_or_path"):
        load_first_adapter(model, config)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"alpha_pattern": {"layers.0": 64}}, "its alpha_pattern is"),
        ({"rank_pattern": {"q_proj": 4}}, "its rank_pattern is"),
        ({"layer_replication": [[0, 1]]}, "its layer_replication is"),
        ({"peft_type": "IA3"}, "its peft_type is IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changed its base model"),
        ({"lora_alpha": 64}, "--lora_alpha 32: the adapter of .* has 64; give that"),
        ({"use_dora": True}, "--use_dora False: the adapter of .* has True; give that"),
        ({"r": "\n"}, "--lora_r 16: the adapter"),
        ([], "must hold a dict"),
    ],
)
def test_boundary_of_an_adapter_that_computes_something_else(saved, config, change, says):
    file = saved[1] / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | change if change else change))
    with pytest.raises(UserError, match=says) as raised:
        check_first_adapter(dataclasses.replace(config, adapter_name_or_path=str(saved[1])))
    assert "\n" not in str(raised.value)


def test_an_adapter_of_an_older_peft_other_modules_or_another_base(saved, config, capsys):
    file = saved[1] / "adapter_config.json"
    config = dataclasses.replace(config, adapter_name_or_path=str(saved[1]))
    content = json.loads(file.read_text())
    older = {name: value for name, value in content.items() if not name.startswith(("use_", "alpha_", "rank_"))}
    file.write_text(json.dumps(older))
    check_first_adapter(config)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--lora_target_modules q_proj: .* is on q_proj v_proj; give these"):
        check_first_adapter(dataclasses.replace(config, lora_target_modules=["q_proj"]))
    file.write_text(json.dumps(content | {"base_model_name_or_path": "someone/else"}))
    check_first_adapter(config)
    assert "was trained on someone/else, and this run's base is" in capsys.readouterr().err


def test_boundary_of_an_adapter_of_other_classes(tmp_path, config):
    """Rows of a classifier's head belong to classes by their order."""
    config = dataclasses.replace(config, adapter_name_or_path=str(tmp_path))
    (tmp_path / "labels.json").write_text('["bad", "good"]')
    check_first_classes(config, ["bad", "good"])
    for classes in (["good", "bad"], ["bad", "good", "new"]):
        with pytest.raises(UserError, match="its classes are bad good, and the data has .*; they must be the same"):
            check_first_classes(config, classes)
