"""Large storage of the tests' Hub: git LFS, in one piece or in parts, and Xet."""

import json
import struct
import time
from math import ceil
from typing import Any

from tests.hub_request import Answer, Handler, RefusedError, as_json, in_part
from tests.hub_store import Blob


def batch(on: Handler, name: str, body: bytes) -> Answer:
    on.repository(name)
    asked, store = json.loads(body), on.store
    objects = []
    for item in asked["objects"]:
        oid, size = item["oid"], item["size"]
        if oid not in store.large:
            upload: dict[str, Any] = {"href": f"{store.url}/lfs/{oid}?signature=s3cr3t"}
            if store.part_bytes and size > store.part_bytes:
                numbers = range(1, ceil(size / store.part_bytes) + 1)
                urls = {str(number): f"{store.url}/part/{oid}/{number}" for number in numbers}
                upload = {
                    "href": f"{store.url}/complete/{oid}",
                    "header": {"chunk_size": str(store.part_bytes), **urls},
                }
            item["actions"] = {"upload": upload, "verify": {"href": f"{store.url}/verify/{name}"}}
        objects.append(item)
    return as_json({"transfer": "basic", "objects": objects})


def put(on: Handler, oid: str, body: bytes) -> Answer:
    return (200, b"", {}) if on.store.keep(oid, body) else as_json({"error": "not what its name says"}, 400)


def put_part(on: Handler, oid: str, number: str, body: bytes) -> Answer:
    with on.store.lock:
        on.store.parts.setdefault(oid, {})[int(number)] = body
    return 200, b"", {"ETag": f'"{number}"'}


def complete(on: Handler, oid: str, body: bytes) -> Answer:
    wanted = [part["partNumber"] for part in json.loads(body)["parts"]]
    parts = on.store.parts.pop(oid, {})
    whole = b"".join(parts.get(number, b"") for number in wanted)
    return as_json({}) if on.store.keep(oid, whole) else as_json({"error": "parts do not fit"}, 400)


def verify(on: Handler, name: str, body: bytes) -> Answer:
    on.repository(name)
    asked = json.loads(body)
    held = on.store.large.get(asked["oid"])
    return as_json({}, 200 if held is not None and len(held) == asked["size"] else 404)


def redirected(on: Handler, blob: Blob, commit: str) -> Answer:
    """What a repository says of a large file: where it is, its name and its size."""
    facts = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content)), "X-Repo-Commit": commit}
    where = f"{on.store.cdn}/cdn/{blob.sha256}?signature=s3cr3t"
    return 302, b"", {"ETag": f'"{blob.git_sha1}"', **facts, "Location": where}


def get(on: Handler, oid: str, _body: bytes) -> Answer:
    """A large file. The address is signed; a token beside that is refused, as the real storage does."""
    if "authorization" in on.headers or on.query.get("signature") != ["s3cr3t"]:
        raise RefusedError(400, message="one kind of authorization")
    answer = in_part(on, on.store.find(oid), {"ETag": f'"{oid}"'})
    if on.command == "GET":
        with on.store.lock:
            on.store.sent += len(answer[1])
    return answer


def xet_token(on: Handler, name: str, _revision: str, _body: bytes) -> Answer:
    on.repository(name, write="create_pr" not in on.query)
    end = int(time.time()) + 3600
    facts = {"casUrl": f"{on.store.url}/cas", "exp": end, "accessToken": "xet-s3cr3t"}
    headers = {"X-Xet-Cas-Url": facts["casUrl"], "X-Xet-Token-Expiration": str(end), "X-Xet-Access-Token": "xet-s3cr3t"}
    return as_json(facts, 200, **headers)


def xorb(on: Handler, _hash: str, body: bytes) -> Answer:
    with on.store.lock:
        on.store.xorb_bytes += len(body)
    return as_json({"was_inserted": True})


def shard(on: Handler, body: bytes) -> Answer:
    """What was sent by Xet, chunk by chunk, is put together here: known by its name, taken from what is awaited."""
    for oid, content in on.store.awaited.items():
        words = struct.pack(">4Q", *struct.unpack("<4Q", bytes.fromhex(oid)))
        if words in body and oid not in on.store.large:
            on.store.keep(oid, content)
    return as_json({"result": 1})
