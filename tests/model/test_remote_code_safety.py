"""No code of a model's or an adapter's folder runs, and nothing is asked: each loader says so itself."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

from lora_dist.data.formats import load_tokenizer
from lora_dist.embedded import BASE_DIR
from lora_dist.errors import UserError
from lora_dist.library import load_base
from lora_dist.model.adapters import check_adapter
from lora_dist.model.files.configs import load_model_config
from lora_dist.model.load import meta_model
from tests.helpers.ranks import ROOT

SOURCES = [
    path
    for folder in ("lora_dist", "recipes", "benchmarks", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
LOADERS = ("from_pretrained", "from_config", "pipeline")  # of transformers and PEFT; each needs trust_remote_code=False
WITHOUT = {  # these have no such argument, and run no code
    "GenerationConfig.from_pretrained",  # reads a JSON file
    "load_dataset", "load_dataset_builder",  # datasets refuses data sets with scripts since version 4
}  # fmt: skip
UNPICKLE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}  # reading runs what the file says


def faults_of(source: str) -> list[str]:
    """What a source file calls that could run code of a folder."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            faults += [name for name in names if name.split(".")[0] in UNPICKLE]
        if not isinstance(node, ast.Call):
            continue
        called, name = ast.unparse(node.func), ast.unparse(node.func).rpartition(".")[2]
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        said = isinstance(given.get("trust_remote_code"), ast.Constant) and given["trust_remote_code"].value is False
        weights_only = ast.unparse(given["weights_only"]) if "weights_only" in given else None
        if name in LOADERS and called not in WITHOUT and not said:
            faults.append(f"{called} without trust_remote_code=False")
        if "trust_remote_code" in given and not said:
            faults.append(f"{called} with another trust_remote_code")
        if called == "torch.load" and weights_only != "True":
            faults.append("torch.load without weights_only=True")
        if name in ("exec", "eval") and called == name or "allow_pickle" in given:
            faults.append(called)
    return faults


def test_each_loader_says_that_no_remote_code_runs():
    faults = {str(path.relative_to(ROOT)): faults_of(path.read_text()) for path in SOURCES}
    # The benchmarks' ranks hand objects to their parent in files of their own.
    assert faults.pop("benchmarks/common.py") == ["torch.load without weights_only=True"]
    assert {path: found for path, found in faults.items() if found} == {}
    assert len(SOURCES) > 80


@pytest.mark.parametrize(
    "source",
    [
        "AutoConfig.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=trust)",
        "AutoModelForCausalLM.from_config(c, trust_remote_code=True)",
        "task.models[type(config)].from_pretrained(None, config=config)",
        "transformers.pipeline('text-generation')",
        "load_dataset(name, trust_remote_code=True)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "numpy.load(file, allow_pickle=True)",
        "import pickle",
        "from joblib import load",
        "exec(text)",
    ],
)
def test_a_loader_that_does_not_is_found(source):
    assert faults_of(source)


WRITES = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
CLASSES = (
    "from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast\n"
    "class Config(OPTConfig):\n    model_type = 'weird'\n"
    "class Model(OPTForCausalLM):\n    config_class = Config\n"
    "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
)


def change_json(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The embedded base with a module that leaves a file `ran`, and a user who would say yes."""
    folder = Path(shutil.copytree(BASE_DIR, tmp_path / "model"))
    (folder / "evil.py").write_text(WRITES + CLASSES)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(WRITES + "def generate(model, **kwargs): pass\n")
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("it asks"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    yield folder
    assert not list(tmp_path.rglob("ran"))


AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", None],
}


def test_a_model_that_only_its_own_code_knows_is_refused(folder):
    change_json(folder / "config.json", model_type="weird", auto_map=AUTO_MAP)
    for load in (load_model_config, load_base, lambda name: meta_model(name, "int8", None)):
        with pytest.raises(
            UserError, match=f"^--model_name_or_path {folder}: config.json: .*; give a model of a class in transf"
        ):
            load(str(folder))


def test_a_known_model_is_loaded_without_its_code(folder):
    change_json(folder / "config.json", auto_map=AUTO_MAP)
    change_json(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    assert type(load_base(str(folder), quantization="none")).__name__ == "OPTForCausalLM"
    assert len(load_tokenizer(str(folder))) > 100


@pytest.mark.parametrize(
    "entries", [{"tokenizer_class": "Tokenizer", "auto_map": AUTO_MAP}, {"tokenizer_class": "evil.X"}]
)
def test_the_tokenizers_class_is_one_of_transformers(folder, entries):
    change_json(folder / "tokenizer_config.json", **entries)
    try:
        tokenizer = load_tokenizer(str(folder))
    except UserError as error:
        assert str(error).startswith(f"--model_name_or_path {folder}: its tokenizer cannot be loaded: ")
    else:
        assert type(tokenizer).__module__.startswith("transformers.")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_from_the_hub_is_refused(folder, key):
    change_json(folder / "config.json", **{key: "someone/kernel"})
    with pytest.raises(UserError, match=f"config.json: {key} someone/kernel is code from the hub"):
        load_model_config(str(folder))


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    entries = {"peft_type": "LORA", "base_model_name_or_path": str(BASE_DIR), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    (folder / "adapter_model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    return folder


@pytest.mark.parametrize(
    "entries, says",
    [
        ({"auto_mapping": {"parent_library": "evil", "base_model_class": "Model"}}, "auto_mapping .* names code"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config .* names code"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path None names no base"),
        ({"base_model_name_or_path": ["a"]}, "names no base"),
        ({"base_model_name_or_path": "/no/such"}, "no such directory"),
    ],
)
def test_an_adapter_that_names_code_is_refused(adapter, entries, says):
    check_adapter(adapter)
    change_json(adapter / "adapter_config.json", **entries)
    with pytest.raises(UserError, match=says):
        check_adapter(adapter)


@pytest.mark.parametrize("content", [b"", b"[]" * 9, b"\xff" * 30])
def test_an_adapter_with_damaged_weights_is_refused(adapter, content):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="^--adapter .*: adapter_model.safetensors: "):
        check_adapter(adapter)


def test_an_adapter_of_pickles_is_not_read(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="holds no file adapter_model.safetensors"):
        check_adapter(adapter)
