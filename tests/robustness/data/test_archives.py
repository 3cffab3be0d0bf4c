"""Archives that unpack to far more than they are."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from rai_toolbox.robustness import InputError, load_data, load_model


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_not_unpacked(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (300, 2**20)})
        for _ in range(300):
            member.write(bytes(2**20))
    with pytest.raises(InputError, match=r"unpacks to 3145.*write it again without compression"):
        load_data(str(tmp_path / "bomb.npz"))
    # As much as twice the bytes of random data, and zeros that stay small, are read.
    np.savez_compressed(tmp_path / "sound.npz", x=np.zeros((1000, 8), np.float32), y=np.arange(1000) % 2)
    assert len(load_data(str(tmp_path / "sound.npz"))) == 1000


def test_a_model_file_that_unpacks_to_far_more_than_it_is_is_not_read(tmp_path):
    for name in ("model.pt2", "model.pt"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data.pkl", bytes(300 * 2**20))
        with pytest.raises(InputError, match="unpacks to 3145"):
            load_model(str(tmp_path / name))
