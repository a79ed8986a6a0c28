"""An S3 server of our own, for as long as a test needs one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def s3_bucket() -> Iterator[str]:
    """A URL under which anything can be written; processes that are started in the block reach it, too."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # one of an earlier server, which is gone, would come back by unpickling
        s3fs.S3FileSystem(skip_instance_cache=True).makedirs(
            "bucket", exist_ok=True
        )  # all servers of a process share what they hold
        yield "s3://bucket/runs"
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
