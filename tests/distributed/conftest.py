import pytest

pytest.register_assert_rewrite("tests.distributed.localizing")  # whose asserts show values too
