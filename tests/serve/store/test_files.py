"""Where the files of an adapter may lie."""

import shutil

import adapter_dirs
import pytest

from preft_jax.errors import AdapterError
from serve.store.files import AdapterFiles


def test_adapters_of_a_watched_directory_lie_in_it_whole(tiny_text, tmp_path):
    watched, loadable, other = (tmp_path.resolve() / name for name in ("watched", "loadable", "other"))
    for factor, folder in enumerate((watched, loadable, other), 1):
        shutil.copytree(adapter_dirs.FIXTURES / "lora", folder / "whole")
        adapter_dirs.edit_tensors(folder / "whole", lambda one, by=factor: one.update({k: by * one[k] for k in one}))
        adapter_dirs.edit_config(folder / "whole", lambda config: config.update(base_model_name_or_path="tiny"))
        (folder / "links").mkdir()
    files = AdapterFiles(tiny_text, dtype="float32", roots=[[watched], [loadable, watched]])

    def link(folder, to):
        for path in (to / "whole").iterdir():
            (folder / "links" / path.name).unlink(missing_ok=True)
            (folder / "links" / path.name).symlink_to(path)

    digests = {folder: files.read(str(folder / "whole")).digest for folder in (watched, loadable, other)}
    allowed = {watched: [watched], loadable: [loadable, watched], other: [watched, loadable, other]}
    for folder, targets in allowed.items():
        for target in digests:
            link(folder, target)
            if target in targets:
                assert files.read(str(folder / "links")).digest == digests[target]
            else:
                with pytest.raises(AdapterError, match="link that leads out"):
                    files.read(str(folder / "links"))
    link(loadable, loadable)
    read = files.read(str(loadable / "links"))
    link(loadable, other)
    with pytest.raises(AdapterError, match="link that leads out"):
        files.load(str(loadable / "links"), read.digest)
