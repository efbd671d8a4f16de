"""Units of memory, and the bytes of a number. Every module takes them from here."""

#: Binary megabytes, for buckets and for what an allocator hands out.
MIB = 2**20
#: Decimal megabytes and gigabytes, for everything else.
MB, GB = 1e6, 1e9

#: Bytes of a number.
FLOAT32, BFLOAT16 = 4, 2
