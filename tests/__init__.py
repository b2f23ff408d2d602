"""Makes `from tests.helpers...` mean this folder, also where another package installed one of that name."""
