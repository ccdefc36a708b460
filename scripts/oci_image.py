"""Owns writing an OCI image from files of this machine, with the shared libraries that they load: one layer, no
registry, no daemon, the same bytes for the same files. Never runs anything in it."""
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/bin"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def libraries(path):
    """Shared libraries, as the loader names them, of a dynamic executable; none for a static one."""
    with open(path, "rb") as f:
        if f.read(4) != b"\x7fELF":
            return []
    said = subprocess.run(["ldd", path], text=True, capture_output=True).stdout
    if "not found" in said:
        raise SystemExit(f"{path} misses libraries:\n{said}")
    return re.findall(r"(/\S+) \(0x", said)


def files_of(files):
    """[(source, path)] with every directory replaced by the files in it, and the libraries of all."""
    flat = []
    for source, path in files:
        if not os.path.isdir(source):
            flat.append((source, path))
            continue
        for base, dirs, names in os.walk(source):
            dirs.sort()
            below = os.path.relpath(base, source)
            flat += [(f"{base}/{n}", os.path.normpath(os.path.join(path, below, n))) for n in sorted(names)]
    return flat + [(lib, lib) for source, _ in list(flat) for lib in libraries(source)]


def layer(files, links):
    """A tar archive with files [(source, path)], links [(path, target)] and the directories they need."""
    out, seen = io.BytesIO(), set()
    with tarfile.open(fileobj=out, mode="w") as tar:
        def directory(path, mode=0o755):
            if path in ("/", "") or path in seen:
                return
            directory(os.path.dirname(path))
            seen.add(path)
            info = tarfile.TarInfo(path.lstrip("/"))
            info.type, info.mode = tarfile.DIRTYPE, mode
            tar.addfile(info)

        directory("/tmp", 0o1777)
        for path in ("/etc", "/run", "/var", "/proc", "/sys", "/dev"):
            directory(path)
        for source, path in files_of(files):
            if path in seen:
                continue
            directory(os.path.dirname(path))
            seen.add(path)
            source = os.path.realpath(source)
            info = tarfile.TarInfo(path.lstrip("/"))
            info.size = os.path.getsize(source)
            info.mode = 0o755 if os.access(source, os.X_OK) else 0o644
            with open(source, "rb") as f:
                tar.addfile(info, f)
        for path, target in links:
            directory(os.path.dirname(path))
            info = tarfile.TarInfo(path.lstrip("/"))
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return out.getvalue()


def archive(name, files, links=(), entry=None):
    """An OCI archive of an image called `name`, which starts `entry`, else the first of its files."""
    if "/" not in name or not re.search(r"[.:]|^localhost$", name.split("/")[0]):
        raise SystemExit(f"image name {name} needs a host part of its own, for example localhost/{name}")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        def add(path, data):
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))

        def blob(data, kind):
            digest = hashlib.sha256(data).hexdigest()
            add(f"blobs/sha256/{digest}", data)
            return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

        machine = os.uname().machine
        content = blob(layer(files, links), "layer.v1.tar")
        config = blob(json.dumps({
            "architecture": ARCHITECTURES.get(machine, machine), "os": "linux",
            "config": {"Entrypoint": [entry or files[0][1]], "Env": [PATH]},
            "rootfs": {"type": "layers", "diff_ids": [content["digest"]]}}).encode(), "config.v1+json")
        manifest = blob(json.dumps({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": [content]}).encode(), "manifest.v1+json")
        names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rsplit(":", 1)[-1]}
        add("index.json", json.dumps({"schemaVersion": 2, "manifests": [{**manifest, "annotations": names}]}).encode())
        add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    return out.getvalue()
