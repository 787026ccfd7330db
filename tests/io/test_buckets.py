"""Folders in buckets: real libraries against servers that hold buckets in memory."""

import json
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from kdjax.io.checkpoints import Checkpoints
from kdjax.io.files import write_whole
from kdjax.io.logs import JsonLines
from kdjax.io.weights import load_tensors, save_tensors
from tests.processes import Processes, free_port

SCRIPT = Path(__file__).parents[1] / "train" / "many_run.py"

# Their servers and libraries leave sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::DeprecationWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture
def google(monkeypatch):
    """A bucket of Google's, for this process and those that it starts."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    download = emulator.objects.download

    def with_generation(request, response, storage):
        """With what Google's own servers tell too, and TensorStore looks for."""
        download(request, response, storage)
        if response.status != HTTPStatus.NOT_FOUND:
            asked = request.params["bucket_name"], request.params["object_id"]
            told = storage.get_file_obj(*asked)["generation"]
            response["x-goog-generation"] = told

    monkeypatch.setattr(emulator.objects, "download", with_generation)
    port = free_port()
    server = emulator.create_server(
        "127.0.0.1", port, in_memory=True, default_bucket="bucket"
    )
    server.start()
    address = f"http://127.0.0.1:{port}"
    environment = {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,  # what Orbax writes arrays with
        # gcsfs would ask for the kind of bucket, which the server does not know.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield epath.Path("gs://bucket")
    server.stop()


@pytest.fixture
def amazon(monkeypatch):
    """A bucket of Amazon's, for this process."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem().mkdir("bucket")
    yield epath.Path("s3://bucket")
    server.stop()


@pytest.fixture(params=["google", "amazon"])
def bucket(request):
    return request.getfixturevalue(request.param)


@pytest.mark.slow
def test_files_records_and_weights(bucket):
    write_whole(bucket / "new" / "table.md", "| é |")
    assert (bucket / "new" / "table.md").read_text() == "| é |"

    log = JsonLines(bucket / "run" / "metrics.jsonl")
    for step in (1, 2):
        log.write(step, {"loss": step / 2}, "train")
    log.flush()
    lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    log.close()
    again = JsonLines(bucket / "run" / "metrics.jsonl")
    again.rewind(1)
    again.write(2, {"loss": 3.0}, "train")
    again.close()
    lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5, 3.0]

    save_tensors(bucket / "weights", {"scale": np.arange(3.0)})
    np.testing.assert_array_equal(load_tensors(bucket / "weights")["scale"], [0, 1, 2])


@pytest.mark.parametrize("folder", ["s3://bucket/run", "az://bucket/run"])
def test_checkpoints_in_buckets_that_orbax_lacks_are_refused(folder):
    with pytest.raises(ValueError, match=f"folder: got {folder}; expected gs://"):
        Checkpoints(folder)


@pytest.mark.slow
def test_two_processes_and_then_one_train_in_a_bucket(google, tmp_path):
    def run(count):
        command = [SCRIPT, f"--folder={google / 'run'}", "--steps=30"]
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            "JAX_ENABLE_X64": "1",
        }
        with Processes(command, count, tmp_path / "printed", **cache) as processes:
            processes.finish()
        saved = [path.name for path in (google / "run" / "checkpoints").iterdir()]
        assert sorted(int(name) for name in saved if name.isdigit()) == [10, 20, 30]
        records = (google / "run" / "metrics.jsonl").read_text().splitlines()
        with (google / "run" / "final.npz").open("rb") as file, np.load(file) as final:
            return dict(final), [json.loads(record)["step"] for record in records]

    expected, steps = run(2)
    (google / "run" / "checkpoints" / "30").rmtree()
    (google / "run" / "final.npz").unlink()
    got, again = run(1)
    assert again == steps
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, 1e-9, 1e-9, err_msg=name)
