"""An S3 server on loopback that really checks signatures, and a log of what it was asked."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "1000000"

import boto3
import requests
from moto.server import ThreadedMotoServer

BUCKET = "pictures"
POLICY = (
    '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'
)


@dataclass
class S3:
    """One server with one bucket, one user, and nobody else let in."""

    url: str
    key: str
    secret: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request since the last ``clear``."""

    def environment(self) -> dict[str, str]:
        """What a program needs to be let in."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy a folder into the bucket; returns its URI."""
        client = self.client()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = f"{prefix}/{path.relative_to(folder).as_posix()}"
                client.put_object(Bucket=BUCKET, Key=name, Body=path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def objects(self, prefix: str, bucket: str = BUCKET) -> dict[str, bytes]:
        """Name below a prefix → bytes."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {
            key[len(prefix) + 1 :]: client.get_object(Bucket=bucket, Key=key)["Body"].read()
            for key in keys
        }

    def digests(self, prefix: str, bucket: str = BUCKET) -> dict[str, str]:
        """SHA-256 of every part of a run, by name."""
        return {
            name: hashlib.sha256(data).hexdigest()
            for name, data in self.objects(prefix, bucket).items()
            if name.startswith(("masks/", "metrics/"))
        }


def start() -> tuple[S3, ThreadedMotoServer]:
    """Start the server, make the user, then close the door behind it."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    admin = {
        "endpoint_url": url,
        "aws_access_key_id": "x",
        "aws_secret_access_key": "x",
        "region_name": "us-east-1",
    }
    iam = boto3.client("iam", **admin)
    iam.create_user(UserName="tester")
    key = iam.create_access_key(UserName="tester")["AccessKey"]
    iam.put_user_policy(UserName="tester", PolicyName="all", PolicyDocument=POLICY)
    boto3.client("s3", **admin).create_bucket(Bucket=BUCKET)
    requests.post(f"{url}/moto-api/reset-auth", data="0", timeout=60)
    s3 = S3(url, key["AccessKeyId"], key["SecretAccessKey"])
    _count(server, s3)
    return s3, server


def _count(server: ThreadedMotoServer, s3: S3) -> None:
    """Note every request that reaches the server."""
    application = server._server.app

    def counting(environ: dict[str, Any], start_response: Any) -> Any:
        s3.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        return application(environ, start_response)

    server._server.app = counting
