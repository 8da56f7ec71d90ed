"""Croissant 1.1: the dataset folder as JSON-LD that machines load. https://mlcommons.org/croissant/1.1

Describes files by relative path and hash, and two record sets by column. Knows nothing of runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

__all__ = ["Records", "croissant"]

_CONTEXT: Final = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "arrayShape": "cr:arrayShape",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}

_FORMATS: Final = {
    ".parquet": "application/x-parquet",
    ".csv": "text/csv",
    ".json": "application/json",
    ".yaml": "application/yaml",
    ".txt": "text/plain",
    ".md": "text/markdown",
    ".png": "image/png",
}


@dataclass(frozen=True)
class Records:
    """The rows of one Parquet file, and what its columns mean."""

    name: str
    file: str
    schema: pa.Schema
    description: str
    meaning: Mapping[str, str] = field(default_factory=dict)


def croissant(files: Mapping[str, tuple[str, int]], records: list[Records], **about: Any) -> dict[str, Any]:
    """The JSON-LD of a folder; `files` are hash and size in bytes by relative path, `about` stands at the top."""
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        **about,
        "distribution": [_file(name, *of) for name, of in files.items()],
        "recordSet": [_record_set(one) for one in records],
    }


def _file(name: str, sha: str, size: int) -> dict[str, Any]:
    suffix = "." + name.rpartition(".")[2]
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{size} B",
        "encodingFormat": _FORMATS[suffix],
        "sha256": sha,
    }


def _record_set(of: Records) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": of.name,
        "name": of.name,
        "description": of.description,
        "key": [{"@id": f"{of.name}/{name}"} for name in ("pair_id", "prompt_id")],
        "field": [_field(of, column) for column in of.schema],
    }


def _field(of: Records, column: pa.Field[Any]) -> dict[str, Any]:
    own = {"@type": "cr:Field", "@id": f"{of.name}/{column.name}", "name": column.name}
    if column.name in of.meaning:
        own["description"] = of.meaning[column.name]
    if not pa.types.is_list(column.type):
        return own | {"dataType": _type(column.type), "source": _source(of, column.name)}
    parts = [
        {
            "@type": "cr:Field",
            "@id": f"{of.name}/{column.name}/{part.name}",
            "name": part.name,
            "dataType": _type(part.type),
            "source": _source(of, column.name) | {"transform": {"jsonPath": part.name}},
        }
        for part in column.type.value_type
    ]
    return own | {"isArray": True, "arrayShape": "-1", "subField": parts}


def _source(of: Records, column: str) -> dict[str, Any]:
    return {"fileObject": {"@id": of.file}, "extract": {"column": column}}


def _type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    if pa.types.is_floating(kind):
        return "cr:Float32" if kind == pa.float32() else "cr:Float64"
    return "sc:Text"
