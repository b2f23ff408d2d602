import pytest

from tests.helpers.wandb_server import FakeWandb


@pytest.fixture
def fake_wandb(tmp_path):
    with FakeWandb(tmp_path / "account") as server:
        yield server
