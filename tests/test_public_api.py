"""`import lora_dist`: it is quick, and its public names are there."""

import subprocess
import sys

import lora_dist


def test_import_is_quick_and_imports_nothing_heavy():
    code = (
        "import resource, sys\n"
        "before = resource.getrusage(resource.RUSAGE_SELF); import lora_dist\n"
        "after = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'peft', 'accelerate', 'yaml') if m in sys.modules]\n"
        "print(after.ru_utime - before.ru_utime, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, _, heavy = done.stdout.partition(" ")
    assert float(seconds) < 0.1 and heavy == "[]\n"


def test_each_public_name_can_be_imported_and_an_unknown_one_is_an_attribute_error():
    assert set(lora_dist.__all__) <= set(dir(lora_dist)) and len(lora_dist.__all__) > 5
    assert all(getattr(lora_dist, name).__module__.startswith("lora_dist.") for name in lora_dist.__all__)
    assert not hasattr(lora_dist, "no_such_name")
