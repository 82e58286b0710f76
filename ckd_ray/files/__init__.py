"""Files and folders, local or in object storage: paths, atomic writes, JSON and checksums."""

from ckd_ray.files.atomic import (
    copy_folder,
    local_copy,
    new_folder,
    remove_stale,
    replace_atomically,
    room_for,
    upload_file,
    write_atomic,
)
from ckd_ray.files.paths import (
    check_inside,
    delete,
    delete_inside,
    exists,
    filesystem_of,
    first_present,
    is_folder,
    is_local,
    join,
    last_part,
    list_files,
    list_folders,
    make_folder,
    parent,
    with_ending,
)
from ckd_ray.files.records import (
    file_signature,
    has_digest,
    read_json,
    read_object,
    sha256_of,
    signatures,
    write_json_atomic,
)

__all__ = [
    "check_inside", "copy_folder", "delete", "delete_inside", "exists", "file_signature", "filesystem_of",
    "first_present", "has_digest", "is_folder", "is_local", "join", "last_part", "list_files", "list_folders",
    "local_copy", "make_folder", "new_folder", "parent", "read_json", "read_object", "remove_stale",
    "replace_atomically", "room_for", "sha256_of", "signatures", "upload_file", "with_ending",
    "write_atomic", "write_json_atomic",
]  # fmt: skip
