"""Which boxes of which stored chunks does this rank need?"""
