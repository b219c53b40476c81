#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "emulator/module.h"
#include "ptx/machine.h"

namespace py = pybind11;

namespace {

// One instruction as Python wrote it down: name, registers, numbers, guard (or -1), negated, line, place.
using Row = std::tuple<std::string, std::vector<int32_t>, std::vector<int64_t>, int32_t, bool, uint32_t, std::string>;
using Values = std::vector<std::tuple<char, int32_t, uint64_t>>;

std::vector<ptx::Constant> constants(const Values& given) {
    std::vector<ptx::Constant> found;
    for (const auto& [file, index, value] : given) found.push_back({file, index, value});
    return found;
}

std::unique_ptr<ptx::Program> assemble(const std::string& name, const std::vector<Row>& rows, const Values& given, int32_t r,
                                       int32_t d, int32_t p) {
    auto made = std::make_unique<ptx::Program>();
    made->name = name;
    made->r = r, made->d = d, made->p = p;
    made->constants = constants(given);
    std::vector<std::pair<size_t, size_t>> starts;
    for (const auto& [opcode, registers, numbers, guard, negated, line, place] : rows) {
        const ptx::Opcode* found = ptx::find_opcode(opcode);
        if (!found) throw std::runtime_error("no opcode " + opcode);
        starts.push_back({made->operands.size(), made->numbers.size()});
        made->operands.insert(made->operands.end(), registers.begin(), registers.end());
        made->numbers.insert(made->numbers.end(), numbers.begin(), numbers.end());
        made->code.push_back({found->run, found, nullptr, nullptr, guard, negated, line});
        made->places.push_back(place);
    }
    for (size_t i = 0; i < starts.size(); ++i) {
        made->code[i].o = made->operands.data() + starts[i].first;
        made->code[i].imm = made->numbers.data() + starts[i].second;
    }
    return made;
}

}  // namespace

PYBIND11_MODULE(_ptx, m) {
    simt::bind(m);
    py::class_<ptx::Program>(m, "Program");
    m.def("operands", [](const std::string& name) -> py::object {
        const ptx::Opcode* found = ptx::find_opcode(name);
        return found ? py::cast(found->operands) : py::none();
    }, "One letter for each operand of an opcode (machine.h), or None where the machine does not know it.");
    m.def("assemble", &assemble);
    m.def("run", [](const ptx::Program& program, std::tuple<unsigned, unsigned, unsigned> blocks, unsigned threads,
                    size_t shared_bytes, bool dependent, const Values& arguments) {
        const auto [x, y, z] = blocks;
        py::gil_scoped_release released;
        ptx::run(program, {dim3(x, y, z), threads, shared_bytes, dependent}, constants(arguments));
    });
}
