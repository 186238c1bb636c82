"""What happens to shards by itself: flipped bits, truncation, members that are swapped, missing or there twice."""

from __future__ import annotations

import numpy as np

from mutations.target import BLOCK, Files, Target, make_tar


def flipped_bit(target: Target) -> tuple[str, Files]:
    data, place, bit = bytearray(target.tar), target.place(len(target.tar)), target.place(8)
    data[place] ^= 1 << bit
    return f"bit {bit} of byte {place}", {f"{target.name}.tar": bytes(data)}


def flipped_bits(target: Target) -> tuple[str, Files]:
    data = bytearray(target.tar)
    places = [target.place(len(data)) for _ in range(target.pick(2, 5, 50))]
    for place in places:
        data[place] ^= 1 << target.place(8)
    return f"bits of {len(places)} bytes", {f"{target.name}.tar": bytes(data)}


def damaged_header(target: Target) -> tuple[str, Files]:
    starts = [len(make_tar(target.members[:i], end=False)) for i in range(len(target.members))]
    place = target.pick(*starts) + target.pick(target.place(100), target.place(BLOCK), 124 + target.place(32))
    data = bytearray(target.tar)
    data[place] = (data[place] + 1 + target.place(255)) % 256
    return f"byte {place} of a header", {f"{target.name}.tar": bytes(data)}


def overwritten(target: Target) -> tuple[str, Files]:
    data, place, length = bytearray(target.tar), target.place(len(target.tar)), target.pick(1, 100, 512, 3000)
    length = min(length, len(data) - place)
    fill = target.pick(bytes(length), b"\xff" * length, target.rng.bytes(length))
    data[place : place + length] = fill
    return f"{length} bytes from {place}", {f"{target.name}.tar": bytes(data)}


def truncated(target: Target) -> tuple[str, Files]:
    place = target.pick(target.place(len(target.tar)), target.place(len(target.tar) // BLOCK) * BLOCK)
    return f"to {place} bytes", {f"{target.name}.tar": target.tar[:place]}


def extended(target: Target) -> tuple[str, Files]:
    tail = target.pick(b"\0", bytes(BLOCK), b"x", target.rng.bytes(700), target.tar, b"\x93NUMPY", bytes(50_000))
    return f"by {len(tail)} bytes", {f"{target.name}.tar": target.tar + tail}


def cut_out(target: Target) -> tuple[str, Files]:
    place = target.place(len(target.tar))
    length = target.pick(1, 17, BLOCK, 2 * BLOCK)
    place = target.pick(place, place // BLOCK * BLOCK)
    data = target.tar[:place] + target.tar[place + length :]
    return f"{length} bytes are gone from {place}", {f"{target.name}.tar": data}


def swapped_members(target: Target) -> tuple[str, Files]:
    members = list(target.members)
    one, other = target.place(len(members)), target.place(len(members) - 1)
    other += other >= one
    how = target.pick("places", "content", "names")
    if how == "places":
        members[one], members[other] = members[other], members[one]
    elif how == "content":
        members[one], members[other] = (members[one][0], members[other][1]), (members[other][0], members[one][1])
    else:
        members[one], members[other] = (members[other][0], members[one][1]), (members[one][0], members[other][1])
    return target.with_members(members, f"{how} of members {one} and {other}")


def duplicated_member(target: Target) -> tuple[str, Files]:
    number = target.place(len(target.members))
    members = list(target.members)
    members.insert(target.pick(number, len(members), target.place(len(members))), members[number])
    return target.with_members(members, f"{members[number][0]} twice")


def removed_member(target: Target) -> tuple[str, Files]:
    number = target.place(len(target.members))
    members = target.members[:number] + target.members[number + 1 :]
    return target.with_members(members, f"without {target.members[number][0]}")


def no_members(target: Target) -> tuple[str, Files]:
    keep = target.pick(0, 1)
    return target.with_members(target.members[:keep], f"only {keep} members")


def renamed_member(target: Target) -> tuple[str, Files]:
    number = target.place(len(target.members))
    key, extension = target.members[number][0].split(".", 1)
    name = target.pick(
        f"{key}x.{extension}", f"9{key}.{extension}", f"{key}.txt", f"{key}.00009.jpg", f"{key}.flipped.npy",
        f"{key}.{extension}.x", f"{key}.json", f"{key}.latents.npy", f"{key}.00000.png",
    )  # fmt: skip
    members = [*target.members[:number], (name, target.members[number][1]), *target.members[number + 1 :]]
    return target.with_members(members, f"{target.members[number][0]} is called {name}")


def other_numbers(target: Target) -> tuple[str, Files]:
    """Values of latents that are not finite, or other pictures."""
    number = target.payload()
    data = bytearray(target.members[number][1])
    if target.members[number][0].endswith(".npy"):
        place = 128 + target.place((len(data) - 128) // 2) * 2
        data[place : place + 2] = np.array(target.pick(np.nan, np.inf, -np.inf, 65504, 0), "<f2").tobytes()
    else:
        data[target.place(len(data))] ^= 0x55
    return target.replaced(number, bytes(data), "of other values")
