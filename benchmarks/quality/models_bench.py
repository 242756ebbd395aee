class ModelsBench:
    def __init__(self, budget, folder, **options): raise NotImplementedError
