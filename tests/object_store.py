"""A store like S3 on this machine: moto's, which counts its requests and can be made to fail."""

import itertools
import threading
from collections import Counter

import pytest

SECRET = "secret-of-the-store"
_NUMBERS = itertools.count(1)


class Store:
    """A server on localhost with one bucket."""

    def __init__(self):
        pytest.importorskip("multistorageclient", reason="needs multi-storage-client[boto3]")
        server = pytest.importorskip("moto.server", reason="needs moto[s3,server]")
        pytest.importorskip("boto3")
        self._app = server.DomainDispatcherApplication(server.create_backend_app)
        self._port = 0
        self._is_dead = lambda method, key: False
        self._is_denied = lambda method, key: False
        self.requests = Counter()
        self.received = self.sent = 0
        self.start()
        self.bucket = f"bucket-{self._port}-{next(_NUMBERS)}"
        self.missing = f"no-{self.bucket}"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "key-of-the-store",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.client.create_bucket(Bucket=self.bucket)
        self.forget()

    def start(self):
        """Serve, at the same address and with the same objects as before."""
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_):
                pass

        self._is_dead = lambda method, key: False
        self._server = make_server(
            "127.0.0.1", self._port, self._answer, threaded=True, request_handler=Quiet
        )
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self._is_dead = lambda method, key: True
        self._server.shutdown()
        self._server.server_close()

    def stop_at(self, method, text, number=1):
        """Stop at a request with `text` in its path, before it is answered."""
        count = itertools.count(1)

        def is_dead(found, key):
            if found == method and text in key and next(count) == number:
                threading.Thread(target=self.stop).start()
                self._is_dead = lambda method, key: True
                return True
            return False

        self._is_dead = is_dead

    def deny(self, *methods):
        self._is_denied = lambda method, key: method in methods

    def forget(self):
        """Count anew."""
        self.requests.clear()
        self.received = self.sent = 0

    @property
    def client(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="key-of-the-store",
            aws_secret_access_key=SECRET,
        )

    def names(self, prefix=""):
        """The objects below a prefix, without it."""
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return sorted(item["Key"].removeprefix(prefix) for item in found.get("Contents", []))

    def folders(self, prefix):
        """The first part of the objects' names below a prefix."""
        return sorted({name.split("/")[0] for name in self.names(prefix)})

    def read(self, key):
        content = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content

    def write(self, key, content):
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def delete(self, key):
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def _answer(self, environment, start):
        method, key = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        if self._is_dead(method, key):
            raise ConnectionAbortedError("the store has stopped")
        if self._is_denied(method, key):
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        self.requests[method] += 1
        if method == "PUT":
            self.received += int(environment.get("CONTENT_LENGTH") or 0)
        content = self._app(environment, start)
        if method == "GET" and "list-type" not in environment.get("QUERY_STRING", ""):
            content = list(content)
            self.sent += sum(map(len, content))
        return content
