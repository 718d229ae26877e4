from msfp.support import memory


def test_pages_of_files_do_not_count_as_taken_and_swap_is_free(tmp_path, monkeypatch):
    files = {
        "STATUS": "VmRSS: 900 kB\nRssAnon: 300 kB\n",
        "MACHINE": "MemAvailable: 5000 kB\nSwapFree: 200 kB\n",
        "LIMIT": "1024000",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(memory, name, tmp_path / name)
    assert memory.available_bytes() == 1024 * (1000 - 300)
    (tmp_path / "LIMIT").write_text("max")
    assert memory.available_bytes() == 1024 * 5200
    (tmp_path / "MACHINE").unlink()
    assert memory.available_bytes() is None
