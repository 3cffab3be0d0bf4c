"""Every form of data, and what is wrong with it in one line."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rai_toolbox.robustness import InputError, load_data
from rai_toolbox.robustness.attack._settings import make_box
from rai_toolbox.robustness.data._rows import FileRows, Spool
from rai_toolbox.robustness.data._samples import as_samples, summarize, targets_for

X = np.arange(24, dtype=np.float32).reshape(6, 4) / 24
Y = np.array([0, 1, 0, 1, 0, 1])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(*rows):
    Path("t.csv").write_text("\n".join(rows) + "\n")
    return "t.csv"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ">f4", np.uint8, np.int32, bool])
def test_npz_is_read_a_slice_at_a_time(place, save, dtype):
    x = (X * 20).astype(dtype)
    save("d.npz", x=x, y=Y, class_names=np.array(["no", "yes"]))
    samples = load_data("d.npz")
    assert torch.equal(samples.inputs(2, 5), torch.from_numpy(x[2:5].astype(np.float32)))
    assert samples.gather([5, 0]).shape == (2, 4)
    assert samples.class_names == ("no", "yes")
    assert (samples.targets == Y).all()
    if save is np.savez:
        assert isinstance(samples.rows, FileRows)


def test_an_array_in_fortran_order_is_the_same_array(place):
    np.savez("d.npz", x=np.asfortranarray(X), y=Y)
    assert np.array_equal(load_data("d.npz").inputs(0, 6).numpy(), X)


def test_a_csv_has_a_label_column_and_features_with_names(place):
    samples = load_data(table("age,income,label", "1,2.5,no", "3,4.5,yes", "5,6,no"))
    assert samples.feature_names == ("age", "income")
    assert samples.class_names == ("no", "yes")
    assert samples.targets.tolist() == [0, 1, 0]
    assert samples.inputs(0, 3).tolist() == [[1, 2.5], [3, 4.5], [5, 6]]


def test_a_parquet_table_is_the_same_as_its_csv(place):
    import pandas as pd

    pd.DataFrame({"a": [1.0, 2.0], "y": [0, 1], "b": [3, 4]}).to_parquet("t.parquet")
    samples = load_data("t.parquet")
    assert samples.feature_names == ("a", "b")
    assert samples.inputs(0, 2).tolist() == [[1, 3], [2, 4]]
    Path("bad.parquet").write_bytes(b"PAR1garbage")
    with pytest.raises(InputError, match="not a Parquet table"):
        load_data("bad.parquet")


def test_a_folder_of_images_has_a_class_per_folder(place):
    from PIL import Image

    for name, value in (("cat", 10), ("dog", 200)):
        (place / "pets" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (5, 4), (value, 0, i)).save(place / "pets" / name / f"{i}.png")
    samples = load_data("pets")
    assert samples.shape == (3, 4, 5)
    assert samples.class_names == ("cat", "dog")
    assert samples.targets.tolist() == [0, 0, 1, 1]
    assert float(samples.inputs(3, 4)[0, 0, 0, 0]) == pytest.approx(200 / 255)
    Image.new("RGB", (6, 4)).save(place / "pets" / "dog" / "z.png")
    with pytest.raises(InputError, match="resize"):
        load_data("pets")
    (place / "pets" / "dog" / "z.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read"):
        load_data("pets")


def test_images_of_16_bits_keep_them(place):
    from PIL import Image

    (place / "scans" / "a").mkdir(parents=True)
    pixels = np.array([[0, 300], [32768, 65535]], dtype=np.uint16)
    Image.fromarray(pixels).save(place / "scans" / "a" / "1.png")
    assert load_data("scans").inputs(0, 1).numpy()[0, 0] == pytest.approx(pixels / 65535, rel=1e-6)
    Image.new("L", (2, 2)).save(place / "scans" / "a" / "2.png")
    with pytest.raises(InputError, match="8 bits a pixel, the ones before it have 16"):
        load_data("scans")
    (place / "floats" / "a").mkdir(parents=True)
    Image.new("F", (2, 2)).save(place / "floats" / "a" / "1.tiff")
    with pytest.raises(InputError, match=r"floats.*npz"):
        load_data("floats")


@pytest.mark.parametrize(("mode", "shape"), [("RGB", (3, 4, 5)), ("L", (1, 4, 5))])
def test_a_data_set_of_images_is_read_as_a_folder_of_them(mode, shape):
    from PIL import Image

    images = [Image.new(mode, (5, 4), (value, 0, 7) if mode == "RGB" else value) for value in (10, 200)]
    for items in ([{"img": image, "label": 1} for image in images], [(image, 1) for image in images]):
        samples = as_samples([*items, items[0]])
        assert samples.shape == shape
        assert samples.inputs(0, 3)[:, 0, 0, 0].tolist() == pytest.approx([10 / 255, 200 / 255, 10 / 255])
    mixed = [(images[0], 1), (np.zeros(shape, np.uint8), 1), (images[1], 0)]
    with pytest.raises(InputError, match="2 of 3 samples are images of Pillow"):
        as_samples(mixed)


def test_items_and_labels_of_another_form_say_what_would_do():
    with pytest.raises(InputError, match=r"expected .input, target. pairs, got tuple of 3"):
        as_samples([(X[0], 1, "id"), (X[1], 0, "id"), (X[2], 0, "id")])
    with pytest.raises(InputError, match=r"entries picture, label; expected one of x, .* rename them"):
        as_samples([{"picture": X[0], "label": 1}] * 3)
    with pytest.raises(InputError, match=r"got \(6, 2\); of one-hot rows give y\.argmax\(axis=1\)"):
        targets_for(as_samples((X, np.eye(2)[Y])), "classification")


def test_samples_of_another_kind_of_number_are_not_cut_to_that_of_the_first():
    with pytest.raises(InputError, match="sample 0 is int64, sample 1 is float64"):
        as_samples([([1, 2], 0), ([1.5, 2.5], 1), ([2, 2], 1)])
    mixed = as_samples([(np.zeros(2, np.float32), 0), (np.full(2, 1.5), 1), (np.ones(2), 1)])
    assert mixed.inputs(1, 2).tolist() == [[1.5, 1.5]]


def test_images_have_a_natural_range_and_series_have_none():
    def limits(shape, dtype=np.float32, top=1):
        x = np.full((2, *shape), top, dtype)
        samples = as_samples((x, np.zeros(2)))
        box = make_box(samples, summarize(samples, "classification"), "auto", None)
        return box.lower, box.upper

    for shape in ((3, 8, 8), (8, 8, 3), (12, 9, 9), (28, 28), (4, 3, 8, 8)):
        assert limits(shape) == (0.0, 1.0)
    for shape in ((13,), (200,), (2, 100), (12, 500)):
        assert limits(shape) == (None, None)
    assert limits((3, 8, 8), np.uint8, 200) == (0.0, 255.0)
    assert limits((3, 8, 8), np.uint8, 1) == (0.0, 1.0)
    assert limits((3, 8, 8), np.float32, 200) == (None, None)
    assert limits((3, 8, 8), np.float32, -1) == (None, None)


def test_a_function_may_import_its_neighbors_when_it_is_called(place):
    (place / "neighbor_of_source.py").write_text("x = [[1.0, 2.0]]\n")
    (place / "lazy.py").write_text("def data():\n    from neighbor_of_source import x\n    return x, [0]\n")
    assert len(load_data(str(place / "lazy.py") + ":data")) == 1


def test_a_function_may_return_arrays_a_dataset_or_a_loader(place):
    Path("source.py").write_text(
        "import numpy as np, torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "x, y = np.ones((6, 4), np.float32), np.zeros(6)\n"
        "def arrays(): return x, y\n"
        "def dataset(): return TensorDataset(torch.tensor(x), torch.tensor(y))\n"
        "def loader(): return DataLoader(dataset(), batch_size=4)\n"
        "def text(): return 'no data'\n"
        "def fails(): raise OSError('disk gone')\n"
    )
    for name in ("arrays", "dataset", "loader"):
        assert len(load_data(f"source.py:{name}")) == 6
    with pytest.raises(InputError, match="got str"):
        load_data("source.py:text")
    with pytest.raises(InputError, match="OSError: disk gone"):
        load_data("source.py:fails")


def test_what_does_not_fit_in_memory_goes_to_a_file():
    spool = Spool(InputError, in_memory=100)
    for start in range(0, 60, 6):
        spool.append(np.arange(start, start + 6, dtype=np.float32).reshape(3, 2))
    rows = spool.rows()
    assert isinstance(rows, FileRows)
    assert rows.read(7, 12).tolist() == [[14, 15], [16, 17], [18, 19], [20, 21], [22, 23]]


def test_the_fingerprint_is_of_the_content_alone(place):
    np.savez("d.npz", x=X, y=Y)
    prints = [summarize(as_samples(data), "classification").fingerprint for data in (load_data("d.npz"), (X, Y))]
    assert prints[0] == prints[1]
    changed = X.copy()
    changed[3, 2] += 1e-6
    assert summarize(as_samples((changed, Y)), "classification").fingerprint != prints[0]


def test_spread_is_right_far_from_zero():
    x = np.random.default_rng(0).normal(1e4, 0.5, size=(500, 3))
    spread = summarize(as_samples((x, np.zeros(500))), "classification").spread
    assert spread == pytest.approx(x.astype(np.float32).std(axis=0), rel=1e-3)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "must begin with a line of at least two column names"),
        (["a,label"], "has no rows"),
        (["a,b", "1,2"], "say which column holds the label"),
        (["a,a,label", "1,2,0"], "two columns named 'a'"),
        (["a,label", "1,0", "x,1"], "row 3, column 'a' is 'x', not a number"),
        (["a,label", "1,0", ",1"], "row 3, column 'a' is empty"),
        (["a,label", "1,0,3"], "row 2: 3 cells, but 2 columns"),
        (["a,label", "1,"], "is empty in sample 0"),
        (["label,y", "1,0"], "say which column"),
        (['a,label', '"1,0'], "not a CSV table"),
    ],
)  # fmt: skip
def test_bad_tables_name_the_row_and_the_column(place, rows, said):
    with pytest.raises(InputError) as caught:
        load_data(table(*rows))
    assert said in str(caught.value)


def test_a_label_column_that_is_not_there_is_named(place):
    with pytest.raises(InputError, match="no column 'lable'; did you mean 'label'"):
        load_data(table("a,label", "1,0"), label_column="lable")


def test_pickles_in_data_are_refused_unread(place):
    np.savez("d.npz", x=np.array([{}, {}], dtype=object), y=Y[:2])
    with pytest.raises(InputError, match="pickled Python objects"):
        load_data("d.npz")
    Path("d.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="is a pickle"):
        load_data("d.pkl")


def test_an_archive_whose_names_climb_out_writes_nothing(place):
    buffer = io.BytesIO()
    np.save(buffer, X)
    with zipfile.ZipFile("d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x.npy", "y.npy", "../../escaped.npy", "/tmp/escaped-rai-toolbox.npy"):
            content = io.BytesIO()
            np.save(content, Y if name == "y.npy" else X)
            archive.writestr(name, content.getvalue())
    before = sorted(place.parent.rglob("*"))
    assert len(load_data("d.npz")) == 6
    assert sorted(place.parent.rglob("*")) == before
    assert not Path("/tmp/escaped-rai-toolbox.npy").exists()


def test_an_archive_that_lies_about_its_size_is_refused(place):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 4)})
    with zipfile.ZipFile("d.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
        archive.writestr("y.npy", buffer.getvalue())
    with pytest.raises(InputError, match="says it has shape"):
        load_data("d.npz")


@pytest.mark.parametrize("spec", ["nothing", "data.xyz", "a\0b", "empty"])
def test_what_is_no_data_says_what_would_be(place, spec):
    Path("data.xyz").write_text("?")
    Path("empty").mkdir()
    with pytest.raises(InputError):
        load_data(spec)


@pytest.mark.parametrize(("first", "second"), [("01", "1"), ("+1", "1"), ("1", "001"), ("-0", "0")])
def test_labels_that_are_written_differently_and_are_one_number_are_refused(tmp_path, first, second):
    path = tmp_path / "table.csv"
    path.write_text(f"a,label\n0.5,{first}\n0.25,{second}\n1,0\n" if "0" not in (first, second) else
                    f"a,label\n0.5,{first}\n0.25,{second}\n1,1\n")  # fmt: skip
    samples = load_data(str(path))
    with pytest.raises(InputError, match="are the same number"):
        targets_for(samples, "classification")
    assert targets_for(samples, "regression").shape == (3, 1)


def test_labels_that_are_written_as_whole_and_as_decimal_numbers_are_one_class(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,label\n0.5,1\n0.25,1.0\n1,0\n")
    assert targets_for(load_data(str(path)), "classification").tolist() == [1, 1, 0]


def test_an_archive_of_many_names_or_of_one_name_twice_is_refused_in_a_short_line(tmp_path):
    path = tmp_path / "many.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(2000):
            archive.writestr(f"a{number}", "")
    with pytest.raises(InputError, match="has no array") as raised:
        load_data(str(path))
    assert len(str(raised.value)) < 700
    np.savez(path, x=np.zeros((4, 2), np.float32), y=np.zeros(4, int))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x.npy", b"")
    with pytest.raises(InputError, match="two arrays of one name"):
        load_data(str(path))
