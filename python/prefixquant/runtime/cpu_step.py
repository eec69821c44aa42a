class CpuStep:
    def __init__(self, decoder):
        self.decoder = decoder

    def decode(self, step, cache, max_length):
        return self.decoder.decode(step, cache, max_length)
