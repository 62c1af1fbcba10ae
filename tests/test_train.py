from conftest import TINY


def test_first(run, text_file, trained):
    result = run("train.py", *TINY, f"data.path={text_file}")
    assert result.code == 0, result
    assert run("sample.py", f"checkpoint={trained}/ckpt.pt", "sampling.steps=3").code == 0
